//! Any bytes as tokenizer.json: an error or a tokenizer, and what it streams is what it decodes. Start from
//! the tokenizers in tests/golden/text. Panics of the `tokenizers` crate are caught, which libFuzzer would
//! count as crashes: its hook is taken away first.
#![no_main]

use ferrule::tokenizer::{Decoder, Tokenizer};
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: std::panic::set_hook(Box::new(|_| {})), |bytes: &[u8]| {
    let Ok(tokenizer) = Tokenizer::from_json(bytes) else { return };
    let Ok(mut ids) = tokenizer.encode("Hello <s> wörld 123\n😀", true, true) else { return };
    ids.extend(0..64);
    let Ok(whole) = tokenizer.decode(&ids, false) else { return };
    let mut decoder = Decoder::new(false);
    let mut text = String::new();
    for id in ids {
        match decoder.push(&tokenizer, id) {
            Ok(piece) => text += &piece,
            Err(_) => return,
        }
    }
    if let Ok(rest) = decoder.finish(&tokenizer) {
        if text + &rest != whole {
            std::process::abort(); // a panic would be silent here
        }
    }
});
