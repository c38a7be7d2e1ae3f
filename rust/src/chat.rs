//! Chat templates (Jinja, as the model's own files give them), rendered by minijinja as transformers renders
//! them with jinja2. Never guesses a template, never reads the clock: the time is an argument.

mod gguf;

use crate::file::{read, read_json};
use crate::{Error, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, ValueKind};
use minijinja::{Environment, ErrorKind, State, Value as Jinja};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::path::Path;

/// The longest template; the longest published ones have 30 KB. Each byte can cost the parser a recursion.
const MAX_TEMPLATE: usize = 96 << 10;
/// The longest of the JSON files that may hold one.
const MAX_CONFIG: u64 = 64 << 20;
/// The longest rendered text.
const MAX_TEXT: usize = 256 << 20;
/// Template instructions per render, and more for each JSON value in the conversation.
const FUEL: (u64, u64) = (200_000, 5_000);
/// Loops, macros (4 each) and includes inside each other.
const DEPTH: usize = 200;
/// Enough to parse the worst template, and for the deepest value that one can build with its fuel.
/// (Address space; memory only where it is touched.)
const STACK: usize = 128 << 20;

/// A model's own chat template.
///
/// A template cannot read files, run forever or recurse without end. It is not confined in memory: one that
/// doubles a string often enough makes the process run out of it.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: Map<String, Value>,
}

impl ChatTemplate {
    /// The template of a model folder: chat_template.jinja, chat_template.json or tokenizer_config.json
    /// (a string or a list of named ones); else that of its GGUF file, or of the GGUF file that `folder` is. `None`
    /// if there is none.
    pub fn open(folder: &Path) -> Result<Option<ChatTemplate>> {
        if !folder.is_dir() {
            return gguf::template(folder);
        }
        let special_tokens = special_tokens(folder)?;
        let path = folder.join("chat_template.jinja");
        if let Some(bytes) = read(&path, MAX_TEMPLATE as u64)? {
            let source = String::from_utf8(bytes)
                .map_err(|e| Error::format(&path, format!("found invalid UTF-8 ({e})")))?;
            return ChatTemplate::new(&source, special_tokens).map(Some);
        }
        for name in ["chat_template.json", "tokenizer_config.json"] {
            let path = folder.join(name);
            let Some(json) = read_json(&path, MAX_CONFIG)? else { continue };
            let wrong = |what: &str| Error::format(&path, format!("chat_template: {what}"));
            match json.get("chat_template") {
                None | Some(Value::Null) => continue,
                Some(Value::String(source)) => {
                    return ChatTemplate::new(source, special_tokens).map(Some);
                }
                Some(Value::Array(list)) => {
                    let mut template = ChatTemplate { environment: environment(), special_tokens };
                    for item in list {
                        let (Some(name), Some(source)) =
                            (item["name"].as_str(), item["template"].as_str())
                        else {
                            return Err(wrong("expected objects with `name` and `template`"));
                        };
                        // transformers uses no others unless asked for them by name.
                        if let Some(name) = ["default", "tool_use"].into_iter().find(|n| *n == name)
                        {
                            template.add(name, source)?;
                        }
                    }
                    return match template.environment.get_template("default") {
                        Ok(_) => Ok(Some(template)),
                        Err(_) => Err(wrong("expected one named `default`")),
                    };
                }
                Some(_) => return Err(wrong("expected a string or a list")),
            }
        }
        gguf::template(folder)
    }

    /// A template given by the user; `special_tokens`: its variables `bos_token` and so on.
    pub fn new(source: &str, special_tokens: Map<String, Value>) -> Result<ChatTemplate> {
        let mut template = ChatTemplate { environment: environment(), special_tokens };
        template.add("default", source)?;
        Ok(template)
    }

    fn add(&mut self, name: &'static str, source: &str) -> Result<()> {
        if source.len() > MAX_TEMPLATE {
            return Err(Error::ChatTemplate(format!(
                "chat template: found {} bytes, expected at most {MAX_TEMPLATE}",
                source.len()
            )));
        }
        let source = without_generation(source);
        on_a_large_stack(|| {
            self.environment.add_template_owned(name, source).map_err(|e| explain(&e))
        })
    }

    /// Renders `messages` (a JSON array of objects with `role` and `content`), as transformers does.
    /// `tools`: null or an empty array if there are none. `extra`: further template variables.
    /// `now`: Unix time in seconds for templates that write the date (UTC); without it they find no
    /// `strftime_now` and write the date they were made with, or fail.
    pub fn render(
        &self,
        messages: &Value,
        tools: &Value,
        add_generation_prompt: bool,
        extra: &Map<String, Value>,
        now: Option<i64>,
    ) -> Result<String> {
        let has_tools = tools.as_array().is_some_and(|tools| !tools.is_empty());
        let none = Value::Null;
        let tools = if has_tools { tools } else { &none };
        on_a_large_stack(|| {
            let mut environment = self.environment.clone();
            let nodes = nodes(messages) + nodes(tools) + extra.values().map(nodes).sum::<u64>();
            environment.set_fuel(Some(nodes.saturating_mul(FUEL.1).saturating_add(FUEL.0)));
            if let Some(now) = now {
                environment.add_function("strftime_now", move |format: &str| strftime(now, format));
            }
            let template = has_tools.then(|| environment.get_template("tool_use").ok()).flatten();
            let template = match template {
                Some(template) => template,
                None => environment.get_template("default").map_err(|e| explain(&e))?,
            };
            let json = |value: &Value| Jinja::from(Serde(value));
            let own = [
                ("messages", json(messages)),
                ("tools", json(tools)),
                ("documents", Jinja::from(())),
                ("add_generation_prompt", Jinja::from(add_generation_prompt)),
            ];
            let tokens = self.special_tokens.iter().chain(extra);
            let variables = (own.map(|(name, value)| (name.to_owned(), value)).into_iter())
                .chain(tokens.map(|(name, value)| (name.clone(), json(value))));
            let mut text = Text(Vec::new());
            template
                .render_captured_to(variables.collect::<BTreeMap<_, _>>(), &mut text)
                .map_err(|e| explain(&e))?;
            String::from_utf8(text.0).map_err(|e| Error::ChatTemplate(e.to_string()))
        })
    }
}

/// The special tokens that the folder's tokenizer_config.json (or special_tokens_map.json), else its GGUF file names:
/// `bos_token`, `eos_token` and so on, as template variables.
pub fn special_tokens(folder: &Path) -> Result<Map<String, Value>> {
    let mut tokens = Map::new();
    if !folder.is_dir() {
        return gguf::tokens(folder);
    }
    for name in ["tokenizer_config.json", "special_tokens_map.json"] {
        let path = folder.join(name);
        let Some(Value::Object(file)) = read_json(&path, MAX_CONFIG)? else { continue };
        for (name, value) in file {
            let text = value.get("content").unwrap_or(&value);
            if name.ends_with("_token") && (text.is_string() || text.is_null()) {
                tokens.entry(name).or_insert(text.clone());
            }
        }
    }
    if tokens.is_empty() {
        return gguf::tokens(folder);
    }
    tokens.retain(|_, text| text.is_string()); // null: there is none, and the variable is undefined
    Ok(tokens)
}

/// Rendered text that may not grow without end.
struct Text(Vec<u8>);

impl io::Write for Text {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_TEXT {
            return Err(io::Error::other(format!("the text is longer than {MAX_TEXT} bytes")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Runs `work` where deep recursion cannot overflow the stack of the caller's thread, which may be small.
fn on_a_large_stack<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, work);
        match thread.map(|thread| thread.join()) {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(Error::ChatTemplate("chat template: the renderer panicked".into())),
            Err(e) => {
                Err(Error::ChatTemplate(format!("chat template: cannot start a thread: {e}")))
            }
        }
    })
}

fn explain(error: &minijinja::Error) -> Error {
    let what = match error.kind() {
        ErrorKind::OutOfFuel => "it runs too long".to_owned(),
        kind => error.detail().map_or(kind.to_string(), str::to_owned),
    };
    let name = match error.name() {
        Some("tool_use") => "chat template `tool_use`",
        _ => "chat template",
    };
    Error::ChatTemplate(match error.line() {
        Some(line) => format!("{name}, line {line}: {what}"),
        None => format!("{name}: {what}"),
    })
}

fn nodes(value: &Value) -> u64 {
    1 + match value {
        Value::Array(items) => items.iter().map(nodes).sum(),
        Value::Object(items) => items.values().map(nodes).sum(),
        _ => 0,
    }
}

/// jinja2 as transformers sets it up, where minijinja differs from it.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.unwrap_or_default()); // fails only for odd delimiters
    environment.set_recursion_limit(DEPTH);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(method);
    environment.add_filter("tojson", tojson);
    for name in ["length", "count"] {
        environment.add_filter(name, |value: &Jinja| match value.is_undefined() {
            true => Ok(0),
            false => minijinja::filters::length(value),
        });
    }
    environment.add_test("iterable", |value: &Jinja| !value.is_none() && value.try_iter().is_ok());
    environment.add_test("sequence", |value: &Jinja| match value.kind() {
        ValueKind::Undefined | ValueKind::String | ValueKind::Seq | ValueKind::Map => true,
        ValueKind::Iterable => value.len().is_some(), // a slice
        _ => false,
    });
    environment.add_filter("indent", indent);
    for name in ["e", "escape"] {
        environment.remove_filter(name); // writes other entities than Python's
    }
    environment.add_function("raise_exception", |message: &Jinja| -> std::result::Result<(), _> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message.to_string()))
    });
    environment
}

/// Python's methods of strings and dicts.
fn method(
    state: &mut State,
    value: &Jinja,
    name: &str,
    args: &[Jinja],
) -> std::result::Result<Jinja, minijinja::Error> {
    // Python counts four more control characters as white space than Unicode does.
    let space = |c: char| c.is_whitespace() || ('\x1c'..='\x1f').contains(&c);
    if let (Some(text), []) = (value.as_str(), args) {
        match name {
            "strip" => return Ok(text.trim_matches(space).into()),
            "lstrip" => return Ok(text.trim_start_matches(space).into()),
            "rstrip" => return Ok(text.trim_end_matches(space).into()),
            _ => {}
        }
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

/// `{% generation %}` marks spans for training; here it is a block that only limits the scope of variables.
fn without_generation(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (head, tag) = rest.split_at(at + 2);
        out.push_str(head);
        rest = tag;
        let body = tag.trim_start_matches(['-', '+']).trim_start();
        for (word, instead) in [("generation", "with"), ("endgeneration", "endwith")] {
            let Some(after) = body.strip_prefix(word) else { continue };
            if after.trim_start().trim_start_matches(['-', '+']).starts_with("%}") {
                out.push_str(&tag[..tag.len() - body.len()]);
                out.push_str(instead);
                rest = after;
            }
        }
    }
    out.push_str(rest);
    out
}

/// jinja2's filter of this name, which keeps a last line break.
fn indent(
    text: &str,
    width: Option<Jinja>,
    first: Option<bool>,
    blank: Option<bool>,
    kwargs: Kwargs,
) -> std::result::Result<String, minijinja::Error> {
    let width = width.or(kwargs.get("width")?).unwrap_or(Jinja::from(4));
    let indent = match width.as_str() {
        Some(text) => text.to_owned(),
        None => " ".repeat(i64::try_from(width)?.clamp(0, 1000) as usize),
    };
    let first = first.or(kwargs.get("first")?).unwrap_or(false);
    let blank = blank.or(kwargs.get("blank")?).unwrap_or(false);
    kwargs.assert_all_used()?;
    let mut out = if first { indent.clone() } else { String::new() };
    for (i, line) in text.split('\n').enumerate() {
        if i > 0 {
            out.push('\n');
            if blank || !line.is_empty() {
                out.push_str(&indent);
            }
        }
        out.push_str(line.strip_suffix('\r').unwrap_or(line));
    }
    Ok(out)
}

/// json.dumps as transformers' filter calls it.
fn tojson(
    value: &Jinja,
    ensure_ascii: Option<bool>,
    indent: Option<Jinja>,
    separators: Option<Vec<String>>,
    kwargs: Kwargs,
) -> std::result::Result<String, minijinja::Error> {
    let indent = indent.or(kwargs.get::<Option<Jinja>>("indent")?).filter(|i| !i.is_none());
    let separators = separators.or(kwargs.get("separators")?);
    let dumps = Dumps {
        ensure_ascii: ensure_ascii.or(kwargs.get("ensure_ascii")?).unwrap_or(false),
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        separators: match separators.as_deref() {
            Some([item, key]) => (item.clone(), key.clone()),
            Some(_) => return Err(invalid("tojson: expected two separators".into())),
            None if indent.is_some() => (",".into(), ": ".into()),
            None => (", ".into(), ": ".into()),
        },
        indent: match indent {
            None => None,
            Some(indent) => Some(match indent.as_str() {
                Some(text) => text.to_owned(),
                None => " ".repeat(i64::try_from(indent)?.clamp(0, 1000) as usize),
            }),
        },
    };
    kwargs.assert_all_used()?;
    let mut out = String::new();
    dumps.value(value, 0, &mut out)?;
    Ok(out)
}

fn invalid(what: String) -> minijinja::Error {
    minijinja::Error::new(ErrorKind::InvalidOperation, what)
}

struct Dumps {
    ensure_ascii: bool,
    sort_keys: bool,
    separators: (String, String),
    indent: Option<String>,
}

impl Dumps {
    fn value(
        &self,
        value: &Jinja,
        depth: usize,
        out: &mut String,
    ) -> std::result::Result<(), minijinja::Error> {
        if depth > DEPTH || out.len() > MAX_TEXT {
            return Err(invalid("tojson: the value is too deep or too long".into()));
        }
        match value.kind() {
            ValueKind::String => self.string(value.as_str().unwrap_or_default(), out),
            ValueKind::None | ValueKind::Bool | ValueKind::Number => out.push_str(&scalar(value)?),
            ValueKind::Seq | ValueKind::Iterable => {
                let mut items = Vec::new();
                for item in value.try_iter()? {
                    items.push((None, item));
                }
                self.container(['[', ']'], items, depth, out)?;
            }
            ValueKind::Map => {
                let mut items = Vec::new();
                for key in value.try_iter()? {
                    let item = value.get_item(&key)?;
                    let key = match key.as_str() {
                        Some(text) => text.to_owned(),
                        None => scalar(&key)?,
                    };
                    items.push((Some(key), item));
                }
                if self.sort_keys {
                    items.sort_by(|a, b| a.0.cmp(&b.0));
                }
                self.container(['{', '}'], items, depth, out)?;
            }
            kind => return Err(invalid(format!("tojson: {kind} is not JSON serializable"))),
        }
        Ok(())
    }

    fn container(
        &self,
        [open, close]: [char; 2],
        items: Vec<(Option<String>, Jinja)>,
        depth: usize,
        out: &mut String,
    ) -> std::result::Result<(), minijinja::Error> {
        let line = |depth: usize, out: &mut String| {
            if let Some(indent) = &self.indent {
                out.push('\n');
                out.push_str(&indent.repeat(depth));
            }
        };
        let empty = items.is_empty();
        out.push(open);
        for (i, (key, item)) in items.into_iter().enumerate() {
            if i > 0 {
                out.push_str(&self.separators.0);
            }
            line(depth + 1, out);
            if let Some(key) = key {
                self.string(&key, out);
                out.push_str(&self.separators.1);
            }
            self.value(&item, depth + 1, out)?;
        }
        if !empty {
            line(depth, out);
        }
        out.push(close);
        Ok(())
    }

    fn string(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\x08' => out.push_str("\\b"),
                '\x0c' => out.push_str("\\f"),
                ' '..='~' => out.push(c),
                c if c >= ' ' && !self.ensure_ascii => out.push(c),
                c => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        _ = write!(out, "\\u{unit:04x}"); // a String takes everything
                    }
                }
            }
        }
        out.push('"');
    }
}

/// JSON of a number, a truth value or nothing, as Python writes it.
fn scalar(value: &Jinja) -> std::result::Result<String, minijinja::Error> {
    Ok(match value.kind() {
        ValueKind::None => "null".into(),
        ValueKind::Bool => value.is_true().to_string(),
        ValueKind::Number if value.is_integer() => value.to_string(),
        ValueKind::Number => float(f64::try_from(value.clone())?),
        kind => return Err(invalid(format!("tojson: {kind} is not a JSON key"))),
    })
}

/// Python's repr of a float: the shortest digits, with an exponent below 1e-4 and from 1e16 on.
fn float(x: f64) -> String {
    if !x.is_finite() {
        return if x.is_nan() {
            "NaN"
        } else if x > 0.0 {
            "Infinity"
        } else {
            "-Infinity"
        }
        .into();
    }
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let after_first = digits.bytes().filter(u8::is_ascii_digit).count() as i32 - 1;
    match exponent.parse::<i32>().unwrap_or(0) {
        e @ -4..16 => format!("{x:.*}", (after_first - e).max(1) as usize),
        e => format!("{digits}e{}{:02}", if e < 0 { '-' } else { '+' }, e.abs()),
    }
}

/// Python's strftime of a time in UTC; `%-d` is a day without a leading zero.
fn strftime(now: i64, format: &str) -> std::result::Result<String, minijinja::Error> {
    const DAYS: [&str; 7] =
        ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    #[rustfmt::skip]
    const MONTHS: [&str; 12] = ["January", "February", "March", "April", "May", "June", "July",
        "August", "September", "October", "November", "December"];
    // Within four digits of year, so that nothing below overflows.
    let now = now.clamp(-62_135_596_800, 253_402_300_799);
    let (day, second) = (now.div_euclid(86_400), now.rem_euclid(86_400));
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    // Howard Hinnant's civil_from_days: years that begin in March have their leap day last.
    let from_march = day + 719_468;
    let (era, day_of_era) = (from_march.div_euclid(146_097), from_march.rem_euclid(146_097));
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day_of_month = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12 + 1;
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let weekday = DAYS[day.rem_euclid(7) as usize];
    let month_name = MONTHS[(month - 1) as usize];

    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut code = chars.next();
        let padded = code != Some('-');
        if !padded {
            code = chars.next();
        }
        let two = |n: i64| if padded { format!("{n:02}") } else { n.to_string() };
        out.push_str(&match code {
            Some('Y') => format!("{year:04}"),
            Some('y') => two(year % 100),
            Some('m') => two(month),
            Some('d') => two(day_of_month),
            Some('H') => two(hour),
            Some('I') => two((hour + 11) % 12 + 1),
            Some('M') => two(minute),
            Some('S') => two(second),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.into(),
            Some('A') => weekday.into(),
            Some('a') => weekday[..3].into(),
            Some('B') => month_name.into(),
            Some('b') => month_name[..3].into(),
            Some('F') => format!("{year:04}-{month:02}-{day_of_month:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('%') => "%".into(),
            _ => return Err(invalid(format!("strftime_now: format {format:?} is not supported"))),
        });
    }
    Ok(out)
}
