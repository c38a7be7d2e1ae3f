//! Chat templates (Jinja, as the model's own files give them), rendered by minijinja as transformers renders
//! them with jinja2. Never guesses a template, never reads the clock: the time is an argument.

mod gguf;
mod jinja2;

use crate::file::gguf_writer::Datum;
use crate::file::{read, read_json};
use crate::{Error, Result};
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind, Value as Jinja};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
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

/// The templates in a folder's JSON files, each with its name; `None` if there are none.
fn sources(folder: &Path) -> Result<Option<Vec<(&'static str, String)>>> {
    let path = folder.join("chat_template.jinja");
    if let Some(bytes) = read(&path, MAX_TEMPLATE as u64)? {
        let source = String::from_utf8(bytes)
            .map_err(|e| Error::format(&path, format!("found invalid UTF-8 ({e})")))?;
        return Ok(Some(vec![("default", source)]));
    }
    for name in ["chat_template.json", "tokenizer_config.json"] {
        let path = folder.join(name);
        let Some(json) = read_json(&path, MAX_CONFIG)? else { continue };
        let wrong = |what: &str| Error::format(&path, format!("chat_template: {what}"));
        match json.get("chat_template") {
            None | Some(Value::Null) => continue,
            Some(Value::String(source)) => return Ok(Some(vec![("default", source.clone())])),
            Some(Value::Array(list)) => {
                let mut sources = Vec::new();
                for item in list {
                    let (Some(name), Some(source)) =
                        (item["name"].as_str(), item["template"].as_str())
                    else {
                        return Err(wrong("expected objects with `name` and `template`"));
                    };
                    // transformers uses no others unless asked for them by name.
                    if let Some(name) = ["default", "tool_use"].into_iter().find(|n| *n == name) {
                        sources.push((name, source.to_owned()));
                    }
                }
                return match sources.iter().any(|(name, _)| *name == "default") {
                    true => Ok(Some(sources)),
                    false => Err(wrong("expected one named `default`")),
                };
            }
            Some(_) => return Err(wrong("expected a string or a list")),
        }
    }
    Ok(None)
}

/// The chat templates of a folder as the metadata of a GGUF file.
pub fn to_gguf(folder: &Path) -> Result<Vec<(String, Datum)>> {
    let key = |(name, source): (&str, String)| match name {
        "default" => ("tokenizer.chat_template".to_owned(), Datum::Text(source)),
        name => (format!("tokenizer.chat_template.{name}"), Datum::Text(source)),
    };
    Ok(sources(folder)?.into_iter().flatten().map(key).collect())
}

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
        let Some(sources) = sources(folder)? else { return gguf::template(folder) };
        let special_tokens = special_tokens(folder)?;
        let mut template = ChatTemplate { environment: jinja2::environment(), special_tokens };
        for (name, source) in sources {
            template.add(name, &source)?;
        }
        Ok(Some(template))
    }

    /// A template given by the user; `special_tokens`: its variables `bos_token` and so on.
    pub fn new(source: &str, special_tokens: Map<String, Value>) -> Result<ChatTemplate> {
        let mut template = ChatTemplate { environment: jinja2::environment(), special_tokens };
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
        let source = jinja2::adapted(source);
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
                environment.add_function("strftime_now", move |format: &str| {
                    jinja2::strftime(now, format)
                });
            }
            let template = has_tools.then(|| environment.get_template("tool_use").ok()).flatten();
            let template = match template {
                Some(template) => template,
                None => environment.get_template("default").map_err(|e| explain(&e))?,
            };
            // It would leave them out, as in transformers, and the model would not know of them.
            if has_tools && template.name() == "default" && !template.source().contains("tools") {
                return Err(Error::ChatTemplate(
                    "chat template: found no place for tools in it; leave `tools` out and describe them in a message, \
                     or give another template (chat_template=)"
                        .into(),
                ));
            }
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
