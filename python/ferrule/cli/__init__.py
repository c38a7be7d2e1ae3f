"""The command `ferrule`. Data goes to stdout, progress and errors to stderr.

Exit status: 0 good, 1 an error of `ferrule`, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, get_args

from .. import __version__
from ..errors import FerruleError, InvalidParameterError
from ..llm import LLM, Quantization
from ..quality import GgufType


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: this process's) and give the exit status."""
    parser = _parser()
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help(sys.stderr)
        return 2
    args, more = parser.parse_known_args(argv)
    # argparse takes the words of a list in one place: those behind an option are left over.
    if more and (not hasattr(args, "words") or any(word.startswith("-") for word in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        args.words += more
    try:
        if sys.stdout is None:
            raise OSError("standard output is closed")
        status: int = args.run(args)
        sys.stdout.flush()
    except FerruleError as error:
        print(f"ferrule: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if sys.stdout is not None:
            # Python flushes stdout once more at exit: let that succeed.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 0  # the reader has had enough
        what = error if error.filename else f"could not write: {error.strerror or error}"
        print(f"ferrule: {what}", file=sys.stderr)
        return 1
    return status


def tell(llm: LLM) -> None:
    """The notes of a load, on stderr."""
    for note in llm.info.notes:
        print(f"ferrule: note: {note}", file=sys.stderr)


def piped(name: str) -> str:
    """All of standard input: UTF-8, whatever the locale; nothing, if it is closed."""
    if sys.stdin is None:
        return ""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InvalidParameterError(
            f"{name}: standard input: {error}; expected UTF-8 text", field=name
        ) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ferrule", description="Run language models on CPUs and small devices."
    )
    parser.add_argument("--version", action="version", version=f"ferrule {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="answer a prompt, or chat",
        description="Answer a prompt and stop; without a prompt, read it from a pipe, or chat on "
        "a terminal. One argument is the model if it is an existing path, an embedded name or of "
        "the form org/repo[:kind]; else it is the prompt, and the embedded model answers. The "
        "prompt is a chat message if the model has a chat template, else text to continue.",
    )
    run.add_argument("words", nargs="*", metavar="[MODEL] [PROMPT]", help="see above")
    run.add_argument("-m", "--model", help="the model; then the one argument is the prompt")
    run.add_argument("-s", "--system", metavar="TEXT", help="a system message to begin with")
    run.add_argument("--chat-template", metavar="FILE", help="Jinja, instead of the model's own")
    run.add_argument("--raw", action="store_true", help="continue the prompt as plain text")
    run.add_argument("--stats", action="store_true", help="print counts and speed to stderr")
    sampling = run.add_argument_group("sampling (default: what the model's files say)")
    for name, kind in _SAMPLING.items():
        sampling.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=kind.__name__[0])
    sampling.add_argument("--stop", action="append", metavar="TEXT", help="may be repeated")
    sampling.add_argument("--ignore-eos", action="store_true")
    _model_options(run)
    run.add_argument("-t", "--threads", type=int, metavar="N", help="default: what there is")
    run.set_defaults(run=_lazy("run"))

    bench = commands.add_parser(
        "bench",
        help="measure speed",
        description="Tokens per second of reading a prompt (pp) and of generating (tg), mean and "
        "standard deviation over repetitions after a warm-up. Prompts are random token ids. "
        "Tokenizing is excluded; scheduling, greedy sampling and detokenizing are included. "
        "Options marked * take several values, separated by commas.",
    )
    bench.add_argument("model", nargs="?", default="tales-4m", metavar="MODEL")
    bench.add_argument("-p", "--n-prompt", type=_numbers, default=[512], help="* 0 = no such test")
    bench.add_argument("-n", "--n-gen", type=_numbers, default=[128], help="* 0 = no such test")
    bench.add_argument("-d", "--depth", type=_numbers, default=[0], help="* tokens before the test")
    bench.add_argument("-b", "--batch", type=_numbers, default=[1], help="* sequences at once")
    bench.add_argument(
        "-t", "--threads", type=_numbers, metavar="N", help="* default: what there is"
    )
    bench.add_argument("-r", "--repetitions", type=int, default=5, metavar="N")
    bench.add_argument("-o", "--output", choices=["md", "csv", "json", "jsonl"], default="md")
    _model_options(bench)
    bench.set_defaults(run=_lazy("bench"))

    info = commands.add_parser(
        "info",
        help="show what this machine and a model offer",
        description="Show versions, CPU "
        "features, kernels and threads; with MODEL, what its headers say and what it takes here.",
    )
    info.add_argument("model", nargs="?", metavar="MODEL")
    _model_options(info)
    info.set_defaults(run=_lazy("info"))

    plan = commands.add_parser(
        "plan",
        help="show whether a model fits into this machine's memory",
        description="From a model's headers alone: for each quantization what its weights, its "
        "keys and values and the rest will take, and how long a context memory holds. Exit status "
        "1 if none fits.",
    )
    plan.add_argument("model", metavar="MODEL")
    _model_options(plan)
    plan.set_defaults(run=_lazy("plan"))

    doctor = commands.add_parser(
        "doctor",
        help="check that this machine is in order",
        description="Check versions, CPU, kernels, cores, clocks, memory and its bandwidth, huge "
        "pages, CUDA, energy sources and the cache. Each line is ok, a warning or a problem, with "
        "the remedy; exit status 1 if there is a problem.",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.add_argument(
        "--device", metavar="D", help="cuda or cuda:0: also compare its kernels with the CPU's"
    )
    doctor.set_defaults(run=_lazy("doctor"))

    inspect = commands.add_parser(
        "inspect",
        help="show what a model file says about itself",
        description="Show the header of a GGUF or safetensors file, or of all files of a model "
        "folder: metadata and tensors. Nothing is loaded, and a broken file is an error.",
    )
    inspect.add_argument("path", metavar="FILE")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_lazy("inspect"))

    tune = commands.add_parser(
        "tune",
        help="find this machine's best settings",
        description="Try numbers of threads and ways of cutting the work, for 10 seconds, and keep "
        "what is faster than the default. Close other programs first. Results do not change.",
    )
    tune.add_argument("--reset", action="store_true", help="go back to the defaults")
    tune.add_argument("--json", action="store_true", help="print JSON")
    tune.set_defaults(run=_lazy("tune"))

    evaluate = commands.add_parser(
        "eval",
        help="measure quality on a text",
        description="Perplexity of a text and, with --reference, the distance from another model's "
        "predictions: KL divergence, how often the likeliest token is the same, flips. A text is "
        "cut into chunks as llama.cpp does, and the second half of each counts; of a .jsonl file "
        'each line\'s "text" is a document, and all of it counts. Intervals are of 95 %, from '
        "the spread between chunks or documents.",
    )
    evaluate.add_argument("model", metavar="MODEL")
    evaluate.add_argument("--reference", metavar="MODEL", help="default: none")
    _text_options(evaluate, "none")
    evaluate.set_defaults(run=_lazy("evaluate"))

    compare = commands.add_parser(
        "compare",
        help="measure how far one model is from another",
        description="As `eval B --reference A`, with A as it is stored or as -r says.",
    )
    compare.add_argument("reference", metavar="A")
    compare.add_argument("model", metavar="B")
    _text_options(compare, "auto")
    compare.set_defaults(run=_lazy("evaluate"))

    quantize = commands.add_parser(
        "quantize",
        help="write a model with its weights quantized",
        description="Quantize the weights of MODEL into the new folder DIR, which `LLM` maps "
        "without further work. With --calibrate the model reads a text first, and weights are "
        "rounded for the least error on what it met. A DIR that ends in .gguf becomes a GGUF file "
        "for other programs. DIR is there only when it is whole.",
    )
    quantize.add_argument("model", metavar="MODEL")
    quantize.add_argument("-o", "--out", required=True, metavar="DIR", help="must not exist")
    quantize.add_argument(
        "-f",
        "--format",
        choices=[*_FORMATS, *_GGUF],
        metavar="FORMAT",
        help=f"{', '.join(_FORMATS)} (default: int4); of a .gguf {', '.join(_GGUF)} (q4_k)",
    )
    quantize.add_argument(
        "--bits",
        type=float,
        metavar="N",
        help="with --calibrate: more than int4 where it matters most, up to N bits a weight",
    )
    quantize.add_argument(
        "--calibrate", metavar="TEXT", help='UTF-8; of .jsonl each "text" is a document'
    )
    quantize.add_argument("--chunks", type=int, metavar="N", help="of TEXT: at most so many")
    quantize.add_argument(
        "--rule",
        action="append",
        default=[],
        type=_rule,
        metavar="PATTERN=FORMAT",
        help="another format for weights whose name fits; may be repeated, the first decides",
    )
    quantize.add_argument("-t", "--threads", type=int, metavar="N", help="default: what there is")
    quantize.add_argument("--revision", metavar="REV", help="of a hub repository")
    quantize.add_argument("--offline", action="store_true", help="use only what is downloaded")
    quantize.add_argument("--family", metavar="FILE", help="TOML that describes the architecture")
    quantize.add_argument("--no-weight-cache", action="store_true", help="keep no packed weights")
    quantize.add_argument("--json", action="store_true", help="print JSON")
    quantize.set_defaults(run=_lazy("quantize"))
    return parser


def _rule(text: str) -> tuple[str, str]:
    pattern, _, form = text.rpartition("=")
    if not pattern or form not in [*_FORMATS, *_GGUF]:
        forms = ", ".join([*_FORMATS, *_GGUF])
        raise argparse.ArgumentTypeError(f"found {text!r}, expected PATTERN= one of {forms}")
    return pattern, form


def _text_options(parser: argparse.ArgumentParser, reference: str) -> None:
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8; - is standard input")
    parser.add_argument("--context", type=int, metavar="N", help="default: 512, or the model's")
    parser.add_argument("--chunks", type=int, metavar="N", help="at most so many")
    parser.add_argument("-t", "--threads", type=int, metavar="N", help="default: what there is")
    parser.add_argument("-q", "--quantization", choices=_QUANTIZATIONS, default="auto")
    parser.add_argument(
        "-r",
        "--reference-quantization",
        choices=_QUANTIZATIONS,
        default=reference,
        help=f"default: {reference}",
    )
    parser.add_argument("--kv-cache-dtype", choices=["f32", "f16", "int8"], default="f16")
    parser.add_argument("--revision", metavar="REV", help="of a hub repository")
    parser.add_argument("--offline", action="store_true", help="use only what is downloaded")
    parser.add_argument("--family", metavar="FILE", help="TOML that describes the architecture")
    parser.add_argument("--no-weight-cache", action="store_true", help="keep no packed weights")
    parser.add_argument("--json", action="store_true", help="print JSON")


_QUANTIZATIONS = get_args(Quantization)
_FORMATS = [name for name in _QUANTIZATIONS if name != "auto"]
_GGUF = get_args(GgufType)
_SAMPLING: dict[str, type] = {
    "max_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "typical_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "min_tokens": int,
    "seed": int,
}


def _model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--device", metavar="D", help="cpu (default), cuda, cuda:0 or auto")
    group.add_argument(
        "--gpu-layers", type=int, metavar="N", help="on the device; default: as many as fit"
    )
    group.add_argument("-q", "--quantization", choices=_QUANTIZATIONS)
    group.add_argument("-c", "--context-length", type=int, metavar="N")
    group.add_argument("--kv-cache-dtype", choices=["f32", "f16", "int8"])
    group.add_argument("--revision", metavar="REV", help="of a hub repository")
    group.add_argument("--offline", action="store_true", help="use only what is downloaded")
    group.add_argument("--family", metavar="FILE", help="TOML that describes the architecture")
    group.add_argument("--no-weight-cache", action="store_true", help="keep no packed weights")
    parser.add_argument("--json", action="store_true", help="print JSON")


def model_keywords(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords for `LLM` from the options of `_model_options`."""
    names = (
        "device", "gpu_layers", "quantization", "context_length", "kv_cache_dtype", "family",
        "revision",
    )  # fmt: skip
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return given | {"offline": args.offline, "weight_cache": not args.no_weight_cache}


def sampling_keywords(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords for `SamplingParams` from the options of `run`."""
    given = {name: getattr(args, name) for name in (*_SAMPLING, "stop")}
    fields = {name: value for name, value in given.items() if value is not None}
    return fields | {"ignore_eos": args.ignore_eos}


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"found {text!r}, expected a whole number, or several with commas between"
        ) from None
    if min(numbers) < 0:
        raise argparse.ArgumentTypeError(f"found {min(numbers)}, expected no negative number")
    return numbers


def _lazy(name: str) -> Any:
    """The function `main` of a sibling module, imported when it is called."""

    def run(args: argparse.Namespace) -> int:
        from importlib import import_module

        status: int = import_module(f".{name}", __name__).main(args)
        return status

    return run
