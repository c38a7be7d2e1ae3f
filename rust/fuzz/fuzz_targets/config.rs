//! config.json x family: whatever the bytes, `Spec::new` gives a model or an error; `quantization_config` is part of
//! it. Input: JSON, and after a zero byte the TOML text of a family, if any. Start from the config.json files in
//! tests/golden and models.
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
        for weight in spec.model_weights() {
            assert!(weight.shape.iter().all(|&n| n > 0), "{weight:?}");
            names.model(weight.what);
        }
        // The first and the last layers; there may be many thousands.
        for l in (0..spec.layers.len()).filter(|l| *l < 8 || l + 8 > spec.layers.len()) {
            for weight in spec.layer_weights(l) {
                assert!(weight.shape.iter().all(|&n| n > 0), "layer {l}: {weight:?}");
            }
        }
    }
});
