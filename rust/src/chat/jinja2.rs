//! jinja2 as transformers sets it up, where minijinja differs from it. Knows no model and no file.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, ErrorKind, State, Value as Jinja};
use std::fmt::Write as _;

use super::{DEPTH, MAX_TEXT};

/// jinja2 as transformers sets it up, where minijinja differs from it.
pub(super) fn environment() -> Environment<'static> {
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
    environment.add_filter("safe_added", safe_added);
    environment.set_formatter(written);
    for name in ["e", "escape"] {
        environment.remove_filter(name); // writes other entities than Python's
    }
    environment.add_function("raise_exception", |message: &Jinja| -> std::result::Result<(), _> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message.to_string()))
    });
    environment
}

/// A template's source as minijinja takes it.
pub(super) fn adapted(source: &str) -> String {
    with_safe_added(&without_generation(source))
}

/// Noncharacters around what `safe` gives where `+` stands beside it.
const SAFE: [char; 2] = ['\u{fdd0}', '\u{fdd1}'];

/// jinja2's `safe` where `+` stands beside it: the text that is added is escaped for HTML, which `written` does
/// at the end. Elsewhere `safe` changes nothing.
fn safe_added(value: Jinja) -> Jinja {
    match value.as_str() {
        Some(text) if !text.contains(SAFE) => format!("{}{text}{}", SAFE[0], SAFE[1]).into(),
        _ => value,
    }
}

/// Calls `safe` by the name `safe_added` where `+` stands before or behind its operand.
fn with_safe_added(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("safe") {
        let (before, after) = (&rest[..at], &rest[at + 4..]);
        out.push_str(before);
        out.push_str("safe");
        rest = after;
        let filter = out[..out.len() - 4].trim_end().strip_suffix('|');
        let is_word = after.starts_with(|c: char| c.is_alphanumeric() || c == '_');
        if let (Some(operand), false) = (filter, is_word)
            && (after.trim_start().starts_with('+') || follows_plus(operand))
        {
            out.push_str("_added");
        }
    }
    out.push_str(rest);
    out
}

/// Whether the operand at the end of `text` has a `+` before it.
fn follows_plus(text: &str) -> bool {
    let (mut depth, mut quote) = (0usize, None);
    for c in text.chars().rev() {
        match (quote, c) {
            (Some(q), c) if c == q => quote = None,
            (Some(_), _) => {}
            (None, '\'' | '"') => quote = Some(c),
            (None, ')' | ']' | '}') => depth += 1,
            (None, '(' | '[' | '{') if depth == 0 => return false,
            (None, '(' | '[' | '{') => depth -= 1,
            (None, '+') if depth == 0 => return true,
            (None, '~' | ',' | '=' | '%' | '<' | '>') if depth == 0 => return false,
            _ => {}
        }
    }
    false
}

/// Writes the value of an expression.
fn written(
    out: &mut minijinja::Output<'_>,
    state: &mut State,
    value: &Jinja,
) -> std::result::Result<(), minijinja::Error> {
    let Some(text) = value.as_str().filter(|text| text.contains(SAFE)) else {
        return minijinja::escape_formatter(out, state, value);
    };
    for (i, part) in text.split(SAFE).enumerate() {
        if i % 2 == 1 {
            out.write_str(part)?;
            continue;
        }
        for c in part.chars() {
            match c {
                '&' => out.write_str("&amp;")?,
                '<' => out.write_str("&lt;")?,
                '>' => out.write_str("&gt;")?,
                '"' => out.write_str("&#34;")?,
                '\'' => out.write_str("&#39;")?,
                c => out.write_char(c)?,
            }
        }
    }
    Ok(())
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
pub(super) fn strftime(now: i64, format: &str) -> std::result::Result<String, minijinja::Error> {
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
