"""Renders chat templates with jinja2, set up as transformers sets it up, into tests/golden/chat/.

usage: python make_chat.py TEMPLATES            ten popular ones and small expressions, for the repository
       python make_chat.py TEMPLATES OUT.json   all of them, for a check of the full set

TEMPLATES holds *.jinja files, for instance models/templates of llama.cpp (MIT; the templates are under
the terms of each model). Needs jinja2 3.1.
"""

import datetime
import json
import sys
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.sandbox

POPULAR = [
    "meta-llama-Llama-3.1-8B-Instruct",
    "Qwen-Qwen2.5-7B-Instruct",
    "Qwen-Qwen3-0.6B",
    "google-gemma-2-2b-it",
    "mistralai-Mistral-Nemo-Instruct-2407",
    "microsoft-Phi-3.5-mini-instruct",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
    "HuggingFaceTB-SmolLM3-3B",
    "openai-gpt-oss-120b",
]
NOW = 1721952000  # 2024-07-26 00:00 UTC
TOKENS = {"bos_token": "<BOS>", "eos_token": "<EOS>", "unk_token": "<UNK>", "pad_token": "<PAD>"}


class Generation(jinja2.ext.Extension):
    """{% generation %} of transformers, without its bookkeeping."""

    tags = {"generation"}  # noqa: RUF012  (as jinja2 declares it)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        call = self.call_method("_generation_support")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    @jinja2.pass_eval_context
    def _generation_support(self, context, caller):
        return caller()


def environment():
    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def strftime_now(format):
        return datetime.datetime.fromtimestamp(NOW, datetime.timezone.utc).strftime(format)

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = strftime_now
    return env


def message(role, content, **more):
    return {"role": role, "content": content, **more}


CALL = {
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": 3}},
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'The weather in a city, "now" & later',
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Name of the <city>"},
                    "days": {"type": "integer", "enum": [1, 3], "default": 1},
                    "units": {"type": "array", "items": {"type": "string"}},
                },
                "required": ["city"],
            },
        },
    },
]
SYSTEM = message("system", "You are helpful.\n")
USER = message("user", "  Hi, 'you' & \"me\" <b> {{ x }} 你好 😀 \n")
ANSWERED = [USER, message("assistant", "Hello!\n\nHow are you? "), message("user", "Fine.")]
THOUGHT = [USER, message("assistant", "<think>\nHm.\n</think>\n\nHello!"), message("user", "Why?")]
CALLED = [USER, message("assistant", "", tool_calls=[{**CALL, "id": "abcdef123"}])]
ASKED = [*CALLED, message("tool", '{"sun": true}', tool_call_id="abcdef123", name="get_weather")]

CONVERSATIONS = {
    "user": {"messages": [USER]},
    "system": {"messages": [SYSTEM, USER]},
    "no prompt": {"messages": [SYSTEM, *ANSWERED], "add_generation_prompt": False},
    "turns": {"messages": ANSWERED},
    "thought": {"messages": [SYSTEM, *THOUGHT]},
    "no thinking": {"messages": [USER], "enable_thinking": False},
    "tools": {"messages": [SYSTEM, USER], "tools": TOOLS},
    "called": {
        "messages": [*ASKED, message("assistant", "Sunny."), message("user", "Thanks")],
        "tools": TOOLS,
    },
    "asked": {"messages": ASKED, "tools": TOOLS},
    "wrong order": {"messages": [message("assistant", "I first"), USER]},
    "parts": {"messages": [message("user", [{"type": "text", "text": "Hi"}])]},
    "empty": {"messages": []},
}

# Where minijinja, its Python-compatible methods or our filters could differ from jinja2.
EXPRESSIONS = [
    "{{ none }} {{ true }} {{ false }} {{ missing }} {{ 1 }} {{ 1.0 }} {{ 1e3 }} {{ 7 // 2 }} {{ 7 / 2 }} {{ 2 ** 3 }}",
    "{{ d }} {{ l }} {{ (1, 'a') }} {{ (1,) }} {{ ['a\\'b', \"c\", 'd\\n', none, true, 1.5] }} {{ {} }} {{ [] }}",
    "{{ 'a' ~ none ~ true ~ 1 ~ 1.0 ~ l ~ d ~ missing }}",
    "{{ d | tojson }} {{ l | tojson }} {{ 'ä\"\\\\\\n\\t</s>&\\'' | tojson }}",
    "{{ d | tojson(indent=2) }} {{ [] | tojson(indent=2) }} {{ [[], {}, [1]] | tojson(indent=4) }}",
    "{{ d | tojson(separators=(',', ':')) }} {{ 'ä😀' | tojson(ensure_ascii=true) }} {{ d | tojson(sort_keys=true) }}",
    "{{ [0.1, 1e100, 1e16, 123456789012345680.0, 1e15, 1e-4, 1e-5, 1.5e-7, -2.5, 100.0, 0.0, 3] | tojson }}",
    "{{ [true, false, none, 12345678901234567890] | tojson }} {{ {1: 2, none: 3, false: 4} | tojson }}",
    "{{ missing | tojson }}",
    "{{ missing.x }}",
    "{{ d.x }}{{ d.x is defined }}",
    "{{ d.x.y }}",
    "{{ none.x }}",
    "{{ 'a' + 1 }}",
    "{{ 'a' + missing }}",
    "{{ missing | length }} {{ 'äb' | length }} {{ d | length }} {{ l | count }}",
    "{{ none | length }}",
    "{{ 5 | length }}",
    "{% for x in missing %}{{ x }}{% else %}none{% endfor %}",
    "{{ missing is defined }} {{ missing is none }} {{ none is none }} {{ missing == none }} {{ not missing }}",
    "{{ none is iterable }} {{ 'a' is iterable }} {{ l is iterable }} {{ d is iterable }} {{ 1 is iterable }} {{ missing is iterable }}",
    "{{ none is sequence }} {{ 'a' is sequence }} {{ l is sequence }} {{ d is sequence }} {{ 1 is sequence }} {{ l[1:] is sequence }} {{ (1,) is sequence }}",
    "{{ none is mapping }} {{ 'a' is mapping }} {{ l is mapping }} {{ d is mapping }} {{ true is number }} {{ 1 is integer }} {{ 1.0 is float }} {{ true is boolean }} {{ 1 is true }}",
    "{{ 'abc'[0] }}{{ 'abc'[-1] }}{{ 'abc'[1:] }}{{ 'abc'[::-1] }}{{ l[-1] }}{{ l[:1] }}{{ l[5:] }}{{ l[9] }}",
    "{{ l[1:] | tojson }} {{ l | reverse | list }} {{ l | first }} {{ l | last }} {{ [] | first }}",
    "[{{ ' a ' | trim }}] [{{ ' a '.strip() }}] [{{ ' a '.lstrip() }}] [{{ ' a '.rstrip() }}] [{{ 'xax'.strip('x') }}] [{{ 'xyax'.rstrip('xy') }}]",
    "[{{ '\\x1c\\u00a0\\u3000 a\\x1f\\u2003'.strip() }}] [{{ none | trim }}] [{{ missing | trim }}] [{{ 1 | trim }}] [{{ 'xax' | trim('x') }}]",
    "{{ 'a b  c'.split() }} {{ 'a,b,,c'.split(',') }} {{ 'a,b,c'.split(',', 1) }} {{ 'a'.split('</think>')[-1] }} {{ 'a<t>b'.split('<t>')[0] }}",
    "{{ 'a\\nb\\r\\nc\\n'.splitlines() }} {{ 'a-b'.replace('-', '+') }} {{ 'aaa'.replace('a', 'b', 2) }} {{ 'aaa' | replace('a', 'b') }}",
    "{{ 'aB'.upper() }}{{ 'aB'.lower() }}{{ 'ab cd'.title() }}{{ 'aB'.capitalize() }}{{ 'aB' | upper }}{{ 'aB' | capitalize }}",
    "{{ 'abc'.startswith('a') }} {{ 'abc'.endswith(('x', 'c')) }} {{ 'abc'.find('c') }} {{ 'b' in 'abc' }} {{ 'k' in d }} {{ 2 in l }} {{ 'x' not in d }}",
    "{{ d.get('k') }} {{ d.get('z') }} {{ d.get('z', 5) }} {{ d['k'] }} {{ d.k }}",
    "{% for k, v in d.items() %}{{ k }}={{ v }},{% endfor %} {% for k in d %}{{ k }}{% endfor %} {{ d.keys() | list }} {{ d.values() | list }} {{ d | items | list }}",
    "{{ d | dictsort }} {{ d.items() | list }}",
    "{{ e.items() | list }} {{ e['items'] }} {{ e.get('items') }}",
    "{{ '%s is %d' | format('a', 5) }} {{ '{} {}'.format('a', 1) }} {{ '{a}'.format(a=1) }}",
    "{{ l | join(', ') }} {{ l | join }} {{ ', '.join(['a', 'b']) }} {{ [1, none, true] | join('-') }}",
    "{{ objects | map(attribute='a') | list }} {{ objects | selectattr('a', 'equalto', 1) | list | length }} {{ objects | rejectattr('b') | list | length }}",
    "{{ l | map('string') | join }} {{ [0, 1, 2] | select | list }} {{ [3, 1, 2] | sort }} {{ [1, 1, 2] | unique | list }} {{ l | sum }} {{ l | max }}",
    "{{ 'a\\nb\\n\\nc' | indent }} [{{ 'a\\nb' | indent(2, true) }}] [{{ 'a\\n\\nb\\n' | indent(2) }}] [{{ 'a\\r\\n\\nb' | indent(2, blank=true) }}]",
    "{{ missing | default('x') }} {{ '' | default('x') }} {{ '' | default('x', true) }} {{ none | default('x') }} {{ none | default('x', true) }} {{ missing | d }}",
    "{{ '5' | int }} {{ '1.5' | float }} {{ 3.7 | int }} {{ 3.75 | round(1) }} {{ 3 | string ~ 'a' }} {{ -3 | abs }}",
    "{% set ns = namespace(a=1) %}{% for i in range(3) %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }} {{ range(2, 8, 3) | list }}",
    "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}{{ i }}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }} {% endfor %}",
    "{% for i in l %}{{ loop.previtem }}<{{ i }}>{{ loop.nextitem }}{{ loop.revindex }}{{ loop.cycle('a', 'b') }} {% endfor %}",
    "{% macro m(a, b=2) %}{{ a }}{{ b }}{% endmacro %}{{ m(1) }}{{ m(1, b=3) }}{{ m(a=4) }}",
    "{% macro m(x) %}{% if x is mapping %}{% for k, v in x.items() %}{{ k }}:{{ m(v) }}{% endfor %}{% else %}{{ x }}{% endif %}{% endmacro %}{{ m({'a': {'b': {'c': 1}}}) }}",
    "{% set x %}a{% if true %}b{% endif %}{% endset %}[{{ x }}] {{ x is string }} {% filter upper %}abc{% endfilter %}",
    "{% generation %}{% set y = 1 %}a{% endgeneration %}[{{ y }}]{%- generation -%} b {%- endgeneration -%} c",
    "a\n  {% if true %}\n  b\n  {% endif %}\n c\n\n",
    "  {%+ if true %}x{% endif +%}\n  y {#- comment -#}  z\n",
    "a {%- if true %} b {%- endif %} c\n\n",
    "{{ 'a' if missing }}|{{ 'a' if missing else 'b' }}|{{ 1 and 'x' }}|{{ 0 or 'y' }}|{{ none or missing or 'z' }}|{{ not none }}",
    "{{ 1 == 1.0 }} {{ '1' == 1 }} {{ [1] == [1] }} {{ {'a': 1} == {'a': 1} }} {{ 1 < 2 < 3 }} {{ 'a' < 'b' }} {{ true == 1 }}",
    "{{ -7 // 2 }} {{ -7 % 3 }} {{ 7 % -3 }} {{ 'ab' * 2 }} {{ [1] + [2] }} {{ [0] * 2 }} {{ 5 - 2.5 }} {{ 10 / 5 }}",
    "{{ -2.5 | tojson }} {{ [1.25e-4, 0.001, 12.5, 1234567.125, 1e22, 5e-324, 1.7976931348623157e308] | tojson }}",
    "{{ raise_exception('no: ' ~ l) }}",
    "{{ l.append(3) }}",
    "{{ unknown('x') }}",
    "{{ 'a' | unknown }}",
    "{{ 'a'.unknown() }}",
    "{% if %}",
    "{{ 'a",
    "{% for x in l %}",
    "{{ 1 / 0 }}",
    "{{ strftime_now('%Y-%m-%d %H:%M:%S %d %b %B %a %A %y %p %I %F %T %%') }} {{ strftime_now('%-d %-m') }}",
    "{% raw %}{{ x }}{% endraw %} {# {{ y }} #} {{ '{{' }} {{ '<b>&' }} {{ '<b>' | safe }}",
    "{% for x in l recursive %}{{ x }}{% endfor %} {% for k, v in [('a', 1), ('b', 2)] %}{{ k }}{{ v }}{% endfor %} {% for x in l if x > 1 %}{{ x }}{{ loop.index }}{% endfor %}",
    "{% set a, b = 1, 2 %}{{ a }}{{ b }} {% with c = 3 %}{{ c }}{% endwith %}[{{ c }}] {% set l2 = l + [5] %}{{ l2 }} {{ dict(a=1, b='x') }}",
]
CONTEXT = {
    "d": {"k": "v", "n": 1, "z2": [1, {"a": None}], "B": True, "f": 0.5, "u": "ä\n'"},
    "e": {"items": [1], "get": 2, "keys": 3},
    "l": [1, 2, 3],
    "objects": [{"a": 1, "b": None}, {"a": 2, "b": 1}],
}


def render(source, variables):
    try:
        return {"text": environment().from_string(source).render(**{**TOKENS, **variables})}
    except Exception as error:
        return {"error": str(error)}


def templates(folder, names):
    for name in names:
        source = (folder / f"{name}.jinja").read_text(encoding="utf-8")
        yield (
            name,
            source,
            {
                key: render(
                    source,
                    {"tools": None, "documents": None, "add_generation_prompt": True, **variables},
                )
                for key, variables in CONVERSATIONS.items()
            },
        )


def dump(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if len(sys.argv) > 2:
        names = sorted(path.stem for path in folder.glob("*.jinja"))
        cases = {
            name: {"source": source, "cases": cases}
            for name, source, cases in templates(folder, names)
        }
        dump(Path(sys.argv[2]), {"conversations": CONVERSATIONS, "templates": cases})
    else:
        out = Path(__file__).parent / "chat"
        out.mkdir(exist_ok=True)
        dump(out / "conversations.json", CONVERSATIONS)
        for name, source, cases in templates(folder, POPULAR):
            (out / f"{name}.jinja").write_text(source, encoding="utf-8")
            dump(out / f"{name}.json", cases)
        expressions = [{"source": source, **render(source, CONTEXT)} for source in EXPRESSIONS]
        dump(out / "expressions.json", {"context": CONTEXT, "expressions": expressions})
