//! Typed reading of `config.json`: every error says which key, what was found, what was expected.
//! Knows no key by itself.

use super::family::Fact;
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::sync::LazyLock;

/// An object of `config.json`; `path` is where it is ("" at the top, "text_config.", ...).
#[derive(Clone)]
pub(super) struct Object<'a> {
    pub(super) map: &'a Map<String, Value>,
    pub(super) path: String,
}

impl<'a> Object<'a> {
    pub(super) fn label(&self, key: &str) -> String {
        format!("{}{key}", self.path)
    }

    pub(super) fn bad(&self, key: &str, found: String, expected: &str) -> Error {
        bad(&self.label(key), &found, expected)
    }

    pub(super) fn missing(&self, key: &str) -> Error {
        bad(&self.label(key), "nothing", "a number")
    }

    /// Keys that say something: not those with null.
    pub(super) fn keys(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.map.iter().filter(|(_, v)| !v.is_null()).map(|(k, _)| k.as_str())
    }

    /// The value of `key`, unless it is null.
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    pub(super) fn object(&self, key: &str) -> Result<Option<Object<'a>>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => {
                Ok(Some(Object { map, path: format!("{}.", self.label(key)) }))
            }
            Some(other) => Err(self.bad(key, shown(other), "an object")),
        }
    }

    fn read<T>(
        &self,
        key: &str,
        expected: &str,
        cast: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        cast(value).map(Some).ok_or_else(|| self.bad(key, shown(value), expected))
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.read(key, "a string", Value::as_str)
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.read(key, "true or false", Value::as_bool)
    }

    pub(super) fn number_in(&self, key: &str, low: f64, high: f64) -> Result<Option<f64>> {
        self.read(key, &range(low, high), |v| v.as_f64().filter(|x| (low..=high).contains(x)))
    }
}

static NOTHING: LazyLock<Map<String, Value>> = LazyLock::new(Map::new);

/// A family's facts about one model: the top of `config.json` and the part that describes the text model.
pub(super) struct Facts<'a> {
    pub(super) top: Object<'a>,
    pub(super) text: Object<'a>,
}

impl<'a> Facts<'a> {
    /// The object in which `key` is looked up, and its name there: "/key" is at the top of the file, "object/key" in
    /// an object of the text model's.
    fn place<'k>(&self, key: &'k str) -> (Object<'a>, &'k str) {
        match key.split_once('/') {
            None => (self.text.clone(), key),
            Some(("", key)) => (self.top.clone(), key),
            Some((inner, key)) => {
                let path = format!("{}.", self.text.label(inner));
                let map = self.text.get(inner).and_then(Value::as_object);
                (Object { map: map.unwrap_or(&NOTHING), path }, key)
            }
        }
    }

    /// The objects that `fact` names, as they are in the file; or its default, if none is there.
    pub(super) fn objects<'b>(&'b self, fact: &'b Fact) -> Result<Vec<Object<'b>>> {
        let found = fact.key.iter().map(|key| {
            let (object, key) = self.place(key);
            object.object(key)
        });
        let found: Vec<_> = found.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
        match &fact.default {
            Some(Value::Object(map)) if found.is_empty() => {
                Ok(vec![Object { map, path: "the family's rotary embedding: ".to_owned() }])
            }
            _ => Ok(found),
        }
    }

    /// What `fact` is for this model, and the key for errors. As in transformers' configuration classes, an
    /// absent key has the default and an explicit null is "none". Two keys that disagree are an error.
    pub(super) fn value<'b>(&'b self, fact: &'b Fact) -> Result<(String, Option<&'b Value>)> {
        let mut found: Option<(String, &Value)> = None;
        let mut null = None;
        for key in &fact.key {
            let (object, key) = self.place(key);
            match object.map.get(key) {
                None => {}
                Some(Value::Null) => null = Some(object.label(key)),
                Some(value) => match &found {
                    Some((other, first)) if *first != value => {
                        let expected = format!("what {other} says, {}", shown(first));
                        return Err(object.bad(key, shown(value), &expected));
                    }
                    Some(_) => {}
                    None => found = Some((object.label(key), value)),
                },
            }
        }
        if let Some((label, value)) = found {
            return Ok((label, Some(value)));
        }
        if let Some(label) = null {
            return Ok((label, None));
        }
        let label = fact
            .key
            .first()
            .map(|key| self.place(key))
            .map_or_else(|| "the family's fact".to_owned(), |(object, key)| object.label(key));
        Ok((label, fact.default.as_ref()))
    }

    /// What the file itself says for `fact`, if anything.
    pub(super) fn given(&self, fact: &Fact) -> Option<&Value> {
        fact.key.iter().find_map(|key| {
            let (object, key) = self.place(key);
            object.get(key)
        })
    }

    fn read<'b, T>(
        &'b self,
        fact: &'b Fact,
        expected: &str,
        cast: impl Fn(&'b Value) -> Option<T>,
    ) -> Result<Option<T>> {
        match self.value(fact)? {
            (_, None) => Ok(None),
            (label, Some(value)) => {
                cast(value).map(Some).ok_or_else(|| bad(&label, &shown(value), expected))
            }
        }
    }

    fn needed<'b, T>(&'b self, fact: &'b Fact, expected: &str, found: Option<T>) -> Result<T> {
        match found {
            Some(x) => Ok(x),
            None => Err(bad(&self.value(fact)?.0, "nothing", expected)),
        }
    }

    /// An integer from 1 to `max`, if there is one.
    pub(super) fn count(&self, fact: &Fact, max: usize) -> Result<Option<usize>> {
        self.read(fact, &format!("a positive integer up to {max}"), |v| {
            v.as_u64().and_then(|x| usize::try_from(x).ok()).filter(|x| (1..=max).contains(x))
        })
    }

    /// An integer from 1 to `max`.
    pub(super) fn need_count(&self, fact: &Fact, max: usize) -> Result<usize> {
        let found = self.count(fact, max)?;
        self.needed(fact, &format!("a positive integer up to {max}"), found)
    }

    /// A number between `low` and `high`, if there is one.
    pub(super) fn number(&self, fact: &Fact, low: f64, high: f64) -> Result<Option<f64>> {
        self.read(fact, &range(low, high), |v| v.as_f64().filter(|x| (low..=high).contains(x)))
    }

    /// A number between `low` and `high`.
    pub(super) fn need_number(&self, fact: &Fact, low: f64, high: f64) -> Result<f64> {
        let found = self.number(fact, low, high)?;
        self.needed(fact, &range(low, high), found)
    }

    /// True or false; null is false.
    pub(super) fn flag(&self, fact: &Fact) -> Result<bool> {
        Ok(self.read(fact, "true or false", Value::as_bool)?.unwrap_or(false))
    }

    /// A string.
    pub(super) fn need_text<'b>(&'b self, fact: &'b Fact) -> Result<&'b str> {
        let found = self.read(fact, "a string", Value::as_str)?;
        self.needed(fact, "a string", found)
    }

    /// A string, if there is one.
    pub(super) fn read_text<'b>(&'b self, fact: &'b Fact) -> Result<Option<&'b str>> {
        self.read(fact, "a string", Value::as_str)
    }

    /// A list, if there is one.
    pub(super) fn list<'b>(&'b self, fact: &'b Fact) -> Result<Option<&'b Vec<Value>>> {
        self.read(fact, "a list", Value::as_array)
    }
}

/// The error for a key of `config.json`.
pub(super) fn bad(label: &str, found: &str, expected: &str) -> Error {
    Error::format("config.json", format!("{label}: found {found}, expected {expected}"))
}

/// A value in an error: JSON, cut where it is long.
pub(super) fn shown(value: &Value) -> String {
    let mut text = match value {
        Value::Array(x) if x.len() > 8 => format!("a list of {}", x.len()),
        Value::Object(_) => "an object".to_owned(),
        other => other.to_string(),
    };
    if let Some((at, _)) = text.char_indices().nth(80) {
        text.truncate(at);
        text.push_str("...");
    }
    text
}

fn range(low: f64, high: f64) -> String {
    if low == f64::MIN_POSITIVE {
        format!("a positive number up to {high:e}")
    } else {
        format!("a number from {low:e} to {high:e}")
    }
}
