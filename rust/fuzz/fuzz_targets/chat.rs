//! Any text as a chat template: an error or a text, in bounded time. Start from
//! tests/golden/chat/*.jinja. Panics of minijinja are caught, so libFuzzer's hook is taken away first.
#![no_main]

use ferrule::chat::ChatTemplate;
use libfuzzer_sys::fuzz_target;
use serde_json::{Map, json};

fuzz_target!(init: std::panic::set_hook(Box::new(|_| {})), |source: &str| {
    let Ok(template) = ChatTemplate::new(source, Map::new()) else { return };
    let messages = json!([
        {"role": "system", "content": "s"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1.5}}}]},
    ]);
    let tools =
        json!([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]);
    _ = template.render(&messages, &tools, true, &Map::new(), Some(0));
});
