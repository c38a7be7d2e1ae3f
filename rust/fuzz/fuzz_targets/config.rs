//! config.json x family: whatever the bytes, `Spec::new` gives a model or an error. Input: JSON, and after a zero
//! byte the TOML text of a family, if any.
#![no_main]

use ferrule::model::spec::Spec;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let (config, family) = match data.iter().position(|b| *b == 0) {
        Some(at) => (&data[..at], std::str::from_utf8(&data[at + 1..]).ok()),
        None => (data, None),
    };
    let Ok(config) = serde_json::from_slice(config) else { return };
    if let Ok(spec) = Spec::new(&config, family) {
        let names = spec.names(|name| name.len() % 2 == 0);
        assert!(spec.layers.iter().all(|l| spec.ropes[l.rope].inv_freq.len() * 2 == spec.head_dim));
        for weight in spec.layer_weights() {
            names.layer(0, weight.what);
        }
        for weight in spec.model_weights() {
            names.model(weight.what);
        }
    }
});
