//! Chat templates (Jinja, as the model's own files give them), rendered by minijinja.

use crate::Result;
use serde_json::{Map, Value};
use std::path::Path;

/// A model's own chat template.
pub struct ChatTemplate {}

impl ChatTemplate {
    /// The template of a model folder: chat_template.jinja, chat_template.json or tokenizer_config.json
    /// (a string or a list of named ones); `None` if there is none.
    pub fn open(_folder: &Path) -> Result<Option<ChatTemplate>> { todo!() }
    /// A template given by the user.
    pub fn new(_source: &str, _special_tokens: Map<String, Value>) -> Result<ChatTemplate> { todo!() }
    /// Renders `messages` (a JSON array of objects with `role` and `content`), as jinja2 does.
    /// `extra`: further template variables.
    pub fn render(&self, _messages: &Value, _tools: &Value, _add_generation_prompt: bool, _extra: &Map<String, Value>) -> Result<String> { todo!() }
}
