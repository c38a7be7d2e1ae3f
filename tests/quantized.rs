//! Quantized safetensors end to end: checkpoints quantized here give, bit by bit, the logits of the numbers that they
//! stand for; and broken ones are errors that name the tensor, what was found, what was expected.

use ferrule::model::{
    Chunk, Forward, KvDtype, KvGroup, LoadOptions, NO_PAGE, Quantization, Sees, Wanted, describe,
    load,
};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

/// Name -> type, shape, bytes.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// A model folder that is removed at the end.
struct Folder {
    path: PathBuf,
    config: Value,
    tensors: Tensors,
}

impl Folder {
    /// A copy of a golden checkpoint.
    fn of(golden: &str, name: &str) -> Folder {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(golden);
        let path = std::env::temp_dir().join(format!("ferrule-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        let bytes = fs::read(source.join("model.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap().tensors().into_iter();
        let tensors =
            tensors.map(|(name, t)| (name, (t.dtype(), t.shape().to_vec(), t.data().to_vec())));
        let config = fs::read(source.join("config.json")).unwrap();
        Folder {
            path,
            config: serde_json::from_slice(&config).unwrap(),
            tensors: tensors.collect(),
        }
    }

    fn write(&self) {
        let views = self.tensors.iter().map(|(name, (dtype, shape, bytes))| {
            (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        safetensors::serialize_to_file(views, None, &self.path.join("model.safetensors")).unwrap();
        fs::write(self.path.join("config.json"), self.config.to_string()).unwrap();
    }

    /// The logits of a few tokens.
    fn logits(&self, quantization: Quantization) -> Result<Vec<f32>, String> {
        self.write();
        let options = LoadOptions {
            quantization,
            kv_dtype: KvDtype::F32,
            isa: std::env::var("FERRULE_ISA").ok(),
            ..LoadOptions::default()
        };
        let model = load(&self.path, options).map_err(|e| e.to_string())?;
        let groups = model.kv_groups();
        let mut kv = model.new_kv(&vec![1; groups.len()]).unwrap();
        let table = |g: &KvGroup| if g.sees == Sees::State { vec![NO_PAGE, 0] } else { vec![0] };
        let pages: Vec<Vec<u32>> = groups.iter().map(table).collect();
        let tokens = [5, 17, 300, 2, 99];
        let chunk =
            Chunk { tokens: &tokens, start: 0, long: false, pages: &pages, wanted: Wanted::All };
        Ok(model.forward(&mut kv, &[chunk], &AtomicBool::new(false)).unwrap())
    }

    /// The error that loading gives; `describe` gives the same where no number is wrong.
    fn error(&self) -> String {
        let error = self.logits(Quantization::Auto).unwrap_err();
        let described = describe(&self.path, &LoadOptions::default());
        assert!(error.contains("not finite") || described.unwrap_err().to_string() == error);
        error
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

fn f32s(x: &[f32]) -> Vec<u8> {
    x.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// Numbers of a bf16 tensor.
fn bf16s(bytes: &[u8]) -> Vec<f32> {
    bytes
        .chunks(2)
        .map(|b| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16))
        .collect()
}

/// What `make` stores for the numbers of a matrix `[n, k]`: tensors by the ends of their names, and the numbers that
/// they stand for.
type Made = (Vec<(&'static str, Dtype, Vec<usize>, Vec<u8>)>, Vec<f32>);

/// Two copies of a golden checkpoint: one with quantized matrices, one with what they stand for.
fn both(
    golden: &str,
    name: &str,
    said: Value,
    modules: &[&str],
    make: impl Fn(&str, &[f32], usize, usize) -> Made,
) -> [Folder; 2] {
    let mut quantized = Folder::of(golden, &format!("{name}-quantized"));
    let mut plain = Folder::of(golden, &format!("{name}-plain"));
    quantized.config["quantization_config"] = said;
    let mut count = 0;
    for (tensor, (dtype, shape, bytes)) in &plain.tensors.clone() {
        let Some(module) = tensor.strip_suffix(".weight") else { continue };
        let (&[n, k], true) = (&shape[..], modules.iter().any(|end| module.ends_with(end))) else {
            continue;
        };
        assert_eq!(*dtype, Dtype::BF16);
        let (made, numbers) = make(module, &bf16s(bytes), n, k);
        quantized.tensors.remove(tensor);
        for (end, dtype, shape, bytes) in made {
            quantized.tensors.insert(format!("{module}{end}"), (dtype, shape, bytes));
        }
        plain.tensors.insert(tensor.clone(), (Dtype::F32, shape.clone(), f32s(&numbers)));
        count += 1;
    }
    assert!(count > 3);
    // Beside F32, not beside what the golden has.
    for (dtype, _, bytes) in plain.tensors.values_mut() {
        if *dtype == Dtype::BF16 {
            (*dtype, *bytes) = (Dtype::F32, f32s(&bf16s(bytes)));
        }
    }
    [quantized, plain]
}

fn same(folders: [Folder; 2]) {
    let [quantized, plain] = folders;
    for quantization in [Quantization::None, Quantization::Int4] {
        let (found, expected) = (quantized.logits(quantization), plain.logits(quantization));
        let [found, expected] = [found, expected].map(Result::unwrap);
        assert!(expected.iter().any(|x| x.abs() > 0.1));
        assert_eq!(found, expected, "{quantization:?}");
    }
    quantized.logits(Quantization::Auto).unwrap();
}

/// Rows of int8 and the largest magnitude of each.
fn rows_of_int8(w: &[f32], k: usize) -> (Vec<i8>, Vec<f32>) {
    let row = |w: &[f32]| {
        let largest = w.iter().fold(0f32, |m, x| m.max(x.abs())).max(1e-9);
        (w.iter().map(|x| (x / largest * 127.0).round() as i8).collect::<Vec<_>>(), largest)
    };
    let rows: Vec<_> = w.chunks(k).map(row).collect();
    (rows.iter().flat_map(|(q, _)| q.clone()).collect(), rows.iter().map(|(_, m)| *m).collect())
}

/// LLM.int8, for which there is no golden. Phi-4-mini: queries, keys and values are one tensor, gate and up another.
#[test]
fn llm_int8_of_fused_matrices() {
    let said = json!({"quant_method": "bitsandbytes", "load_in_8bit": true, "load_in_4bit": false,
        "llm_int8_threshold": 6.0, "llm_int8_has_fp16_weight": false});
    let make = |_: &str, w: &[f32], n: usize, k: usize| -> Made {
        let (q, largest) = rows_of_int8(w, k);
        let scale = |i: usize| largest[i / k] * (1.0 / 127.0);
        let numbers = q.iter().enumerate().map(|(at, &q)| scale(at) * f32::from(q)).collect();
        let bytes = q.iter().map(|&q| q as u8).collect();
        let tensors = vec![
            (".weight", Dtype::I8, vec![n, k], bytes),
            (".SCB", Dtype::F32, vec![n], f32s(&largest)),
            (".weight_format", Dtype::U8, vec![], vec![0]),
        ];
        (tensors, numbers)
    };
    let modules = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"];
    let [mut quantized, plain] = both("phi4-mini-a", "llm-int8", said, &modules, make);
    let found = describe_after_write(&quantized);
    assert_eq!(found, "bitsandbytes: int8, one scale for an output");
    let order = "model.layers.0.mlp.down_proj.weight_format";
    quantized.tensors.get_mut(order).unwrap().2 = vec![2];
    let error = quantized.error();
    assert!(error.contains(&format!("tensor `{order}`: found [2], expected [0]")), "{error}");
    quantized.tensors.get_mut(order).unwrap().2 = vec![0];
    same([quantized, plain]);
}

/// Integers of 4 bits in groups of 32, which are kept as they are, of parts of fused matrices.
#[test]
fn packed_integers_of_fused_matrices() {
    let said = json!({"quant_method": "compressed-tensors", "format": "pack-quantized",
        "quantization_status": "compressed", "config_groups": {"a": {"targets": ["Linear"], "weights":
            {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": false}}}});
    let make = |_: &str, _: &[f32], n: usize, k: usize| -> Made {
        let groups = k.div_ceil(32); // the last of `down` is half a group
        let code = |i: usize, j: usize| ((i * 5 + j * 3 + j / 7) % 16) as u32;
        let zero = |i: usize, g: usize| ((i + 3 * g) % 16) as u32;
        let scale = |i: usize, g: usize| half::bf16::from_f32(0.004 + (i % 9 + g) as f32 / 2048.0);
        let word =
            |all: &dyn Fn(usize) -> u32| (0..8).fold(0, |w, s| w | all(s) << (4 * s)).to_le_bytes();
        let row = |i: usize| (0..k / 8).flat_map(move |c| word(&|s| code(i, 8 * c + s)));
        let column = |r: usize| (0..groups).flat_map(move |g| word(&|s| zero(8 * r + s, g)));
        let scales = (0..n).flat_map(|i| (0..groups).flat_map(move |g| scale(i, g).to_le_bytes()));
        let number = |at: usize| {
            let (i, g) = (at / k, at % k / 32);
            scale(i, g).to_f32() * (code(i, at % k) as f32 - zero(i, g) as f32)
        };
        let shape = [n as i64, k as i64].iter().flat_map(|x| x.to_le_bytes()).collect();
        let tensors = vec![
            (".weight_packed", Dtype::I32, vec![n, k / 8], (0..n).flat_map(row).collect()),
            (".weight_scale", Dtype::BF16, vec![n, groups], scales.collect()),
            (
                ".weight_zero_point",
                Dtype::I32,
                vec![n / 8, groups],
                (0..n / 8).flat_map(column).collect(),
            ),
            (".weight_shape", Dtype::I64, vec![2], shape),
        ];
        (tensors, (0..n * k).map(number).collect())
    };
    let modules = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"];
    let folders = both("phi4-mini-a", "packed", said, &modules, make);
    folders[0].write();
    let packed = describe(&folders[0].path, &LoadOptions::default()).unwrap().packed;
    let forms: Vec<&str> = packed.iter().map(|(form, _)| *form).collect();
    assert_eq!(forms, ["bf16", "grouped", "int8"]);
    same(folders);
}

fn describe_after_write(folder: &Folder) -> String {
    folder.write();
    describe(&folder.path, &LoadOptions::default()).unwrap().quantization.unwrap()
}

/// FP8 in blocks that do not divide the matrices. DeepSeek V3: columns of `kv_b_proj` become rows; experts; a module
/// that is left as it is.
#[test]
fn fp8_blocks_of_latent_attention() {
    let said = json!({"quant_method": "fp8", "weight_block_size": [24, 20], "fmt": "e4m3",
        "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head", "mlp.gate"]});
    let make = |_: &str, w: &[f32], n: usize, k: usize| -> Made {
        let (tall, wide) = (n.div_ceil(24), k.div_ceil(20));
        let scales: Vec<f32> = (0..tall * wide).map(|b| 0.01 + b as f32 / 4096.0).collect();
        // Not the nearest codes: any will do.
        let code = |x: f32, at: usize| (at * 7 % 0x50) as u8 | if x < 0.0 { 0x80 } else { 0 };
        let codes: Vec<u8> = w.iter().enumerate().map(|(at, &x)| code(x, at)).collect();
        let value = |byte: u8| {
            let (e, m) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
            let x = if e == 0 { m / 512.0 } else { (1.0 + m / 8.0) * 2f32.powi(e - 7) };
            if byte > 127 { -x } else { x }
        };
        let number = |at: usize| value(codes[at]) * scales[at / k / 24 * wide + at % k / 20];
        let numbers = (0..n * k).map(number).collect();
        let tensors = vec![
            (".weight_scale_inv", Dtype::F32, vec![tall, wide], f32s(&scales)),
            (".weight", Dtype::F8_E4M3, vec![n, k], codes),
        ];
        (tensors, numbers)
    };
    let modules = ["_proj", "_a_proj_with_mqa"];
    same(both("deepseek-v3-a", "fp8-latent", said, &modules, make));
}

/// NVFP4 as compressed-tensors and as ModelOpt store it, for which there are no goldens.
#[test]
fn nvfp4_of_two_programs() {
    let groups = |format: &str| {
        json!({"quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed",
            "ignore": ["lm_head"], "config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 4,
                "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": true,
                "dynamic": false}}}})
    };
    let modelopt =
        json!({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]});
    for (said, modelopt) in [(groups("nvfp4-pack-quantized"), false), (modelopt, true)] {
        let make = |module: &str, w: &[f32], n: usize, k: usize| -> Made {
            let all = 0.01 + module.len() as f32 / 4096.0; // another one for each of the fused parts
            let times = if modelopt { all } else { 1.0 / (1.0 / all) };
            let scales: Vec<u8> = (0..n * k / 16).map(|g| 0x20 + (g * 7 % 0x20) as u8).collect();
            let scale = |byte: u8| {
                (1.0 + f32::from(byte & 7) / 8.0) * 2f32.powi(i32::from(byte >> 3) - 7) * times
            };
            let code = |at: usize, x: f32| (at * 5 % 8) as u8 | if x < 0.0 { 8 } else { 0 };
            let codes: Vec<u8> = w.iter().enumerate().map(|(at, &x)| code(at, x)).collect();
            let value = |q: u8| {
                let x = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][usize::from(q % 8)];
                if q > 8 { -x } else { x }
            };
            let numbers = (0..n * k).map(|at| scale(scales[at / 16]) * value(codes[at])).collect();
            let bytes = codes.chunks(2).map(|two| two[0] | two[1] << 4).collect();
            let (end, last) = match modelopt {
                true => (".weight", (".weight_scale_2", Dtype::F32, vec![], f32s(&[all]))),
                false => (
                    ".weight_packed",
                    (".weight_global_scale", Dtype::F32, vec![1], f32s(&[1.0 / all])),
                ),
            };
            let input = if modelopt { ".input_scale" } else { ".input_global_scale" };
            let tensors = vec![
                (end, Dtype::U8, vec![n, k / 2], bytes),
                (".weight_scale", Dtype::F8_E4M3, vec![n, k / 16], scales),
                last,
                (input, Dtype::F32, vec![1], f32s(&[0.5])),
            ];
            (tensors, numbers)
        };
        let folders = both("phi4-mini-a", "nvfp4", said, &["qkv_proj", "o_proj", "_up_proj"], make);
        folders[0].write();
        let found = describe(&folders[0].path, &LoadOptions::default()).unwrap();
        assert!(found.packed.iter().any(|(form, _)| *form == "grouped"), "{:?}", found.packed);
        let (mut auto, plain) = (
            folders[0].logits(Quantization::Auto).unwrap(),
            folders[1].logits(Quantization::Int8).unwrap(),
        );
        let largest = plain.iter().fold(0f32, |m, x| m.max(x.abs()));
        auto.iter_mut().zip(&plain).for_each(|(a, b)| *a -= b);
        assert!(auto.iter().all(|x| x.abs() < 0.1 * largest));
        let mut broken = Folder::of("phi4-mini-a", "nvfp4-broken");
        broken.config = folders[0].config.clone();
        broken.tensors = folders[0].tensors.clone();
        let end = if modelopt { "weight_scale_2" } else { "weight_global_scale" };
        let name = format!("model.layers.1.self_attn.o_proj.{end}");
        broken.tensors.get_mut(&name).unwrap().2 = f32s(&[0.0]);
        let error = broken.error();
        assert!(
            error.contains(&format!("`{name}`: found 0, expected a positive number")),
            "{error}"
        );
        same(folders);
    }
}

/// compressed-tensors with a format for each group of modules: parts of one packed matrix are stored differently.
#[test]
fn groups_of_modules_with_formats_of_their_own() {
    let weights =
        |kind: &str, strategy: &str| json!({"num_bits": 8, "type": kind, "strategy": strategy});
    let said = json!({"quant_method": "compressed-tensors", "format": "mixed-precision",
        "quantization_status": "compressed", "ignore": ["lm_head", "re:.*layers\\.0\\.mlp\\.up_proj"],
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": false},
        "config_groups": {
            "a": {"targets": ["Linear"], "format": "int-quantized", "weights": weights("int", "channel"),
                "input_activations": {"num_bits": 8, "dynamic": true, "strategy": "token"}},
            "b": {"targets": ["re:.*[qk]_proj$"], "format": "float-quantized", "weights": weights("float", "tensor")}}});
    let make = |module: &str, w: &[f32], n: usize, k: usize| -> Made {
        if module.ends_with("q_proj") || module.ends_with("k_proj") {
            let codes: Vec<u8> = w.iter().map(|&x| 0x30 | if x < 0.0 { 0x80 } else { 0 }).collect();
            let numbers = codes.iter().map(|&q| if q < 128 { 0.125 } else { -0.125 }).collect();
            return (
                vec![
                    (".weight", Dtype::F8_E4M3, vec![n, k], codes),
                    (".weight_scale", Dtype::F32, vec![1], f32s(&[0.25])),
                    (".input_scale", Dtype::F32, vec![1], f32s(&[0.5])),
                ],
                numbers,
            );
        }
        let (q, largest) = rows_of_int8(w, k);
        let scales: Vec<f32> = largest.iter().map(|m| m / 127.0).collect();
        let numbers = q.iter().enumerate().map(|(at, &q)| scales[at / k] * f32::from(q)).collect();
        let bytes = q.iter().map(|&q| q as u8).collect();
        let tensors = vec![
            (".weight", Dtype::I8, vec![n, k], bytes),
            (".weight_scale", Dtype::F32, vec![n, 1], f32s(&scales)),
        ];
        (tensors, numbers)
    };
    // Without layer 0's up: that stays BF16, beside a quantized gate.
    let modules = ["_proj"];
    let skip = "model.layers.0.mlp.up_proj";
    let [mut quantized, mut plain] = both("qwen3-a", "groups", said, &modules, make);
    let golden = Folder::of("qwen3-a", "groups-golden");
    let up = golden.tensors[&format!("{skip}.weight")].clone();
    quantized.tensors.remove(&format!("{skip}.weight_scale"));
    plain.tensors.insert(format!("{skip}.weight"), (Dtype::F32, up.1.clone(), f32s(&bf16s(&up.2))));
    quantized.tensors.insert(format!("{skip}.weight"), up);
    for l in 0..2 {
        let name = format!("model.layers.{l}.self_attn.k_scale");
        quantized.tensors.insert(name, (Dtype::F32, vec![1], f32s(&[1.0])));
    }
    let name = describe_after_write(&quantized);
    assert_eq!(
        name,
        "compressed-tensors: fp8 e4m3, one scale for a matrix; int8, one scale for an output"
    );
    // A module that should not be quantized, but is.
    let mut strange = Folder::of("qwen3-a", "groups-strange");
    strange.config = quantized.config.clone();
    strange.tensors = quantized.tensors.clone();
    let scale = strange.tensors["model.layers.1.mlp.up_proj.weight_scale"].clone();
    strange.tensors.insert(format!("{skip}.weight_scale"), scale);
    let error = strange.error();
    assert!(
        error.contains("layers.0.mlp.up_proj.weight_scale`") && error.contains("not quantized"),
        "{error}"
    );
    same([quantized, plain]);
}

#[test]
fn broken_tensors_are_named() {
    let gptq = "quant-gptq-int4-g32-actorder-sym-a";
    let down = "model.layers.1.mlp.down_proj";
    let name = |end: &str| format!("{down}{end}");
    let cases: &[(&str, &str, fn(&mut (Dtype, Vec<usize>, Vec<u8>)), &str)] = &[
        (gptq, ".qweight", |t| t.1 = vec![128, 16], "found I32 [128, 16], expected I32 [16, 128]"),
        (gptq, ".qzeros", |t| t.0 = Dtype::F32, "found F32 [4, 16], expected I32 [4, 16]"),
        (
            gptq,
            ".scales",
            |t| t.1 = vec![128, 4],
            "found F16 [128, 4], expected F32 or F16 or BF16 or F8_E8M0 [4, 128]",
        ),
        (
            gptq,
            ".g_idx",
            |t| t.2[20..24].copy_from_slice(&4i32.to_le_bytes()),
            "found group 4 for input 5, expected groups from 0 to 3",
        ),
        (
            gptq,
            ".g_idx",
            |t| t.2[20..24].copy_from_slice(&(-3i32).to_le_bytes()),
            "found group -3 for input 5, expected groups from 0 to 3",
        ),
        (
            "quant-ct-w4a16-g32-asym-a",
            ".weight_shape",
            |t| t.2[0] = 127,
            "found [127, 128], expected [128, 128]",
        ),
        (
            "quant-ct-w4a16-g32-asym-a",
            ".weight_packed",
            |t| t.1 = vec![64, 32],
            "found I32 [64, 32], expected I32 [128, 16]",
        ),
        (
            "quant-bnb-nf4-double-a",
            ".weight.quant_state.bitsandbytes__nf4",
            |t| t.2[0] = b'[',
            "expected JSON",
        ),
        (
            "quant-bnb-nf4-double-a",
            ".weight.absmax",
            |t| t.1 = vec![2, 128],
            "found U8 [2, 128], expected U8 [256]",
        ),
        (
            "quant-fp8-block-moe-a",
            ".weight",
            |t| t.0 = Dtype::F8_E5M2,
            "found F8_E5M2 [128, 128], expected F8_E4M3 [128, 128]",
        ),
        (
            "quant-fp8-block-moe-a",
            ".weight_scale_inv",
            |t| t.1 = vec![1],
            "found F32 [1], expected F32 or F16 or BF16 or F8_E8M0 [1, 1]",
        ),
    ];
    for (i, (golden, end, change, expected)) in cases.iter().enumerate() {
        let mut folder = Folder::of(golden, &format!("broken-{i}"));
        let tensor = match golden.contains("moe") {
            true => format!("model.layers.0.mlp.experts.2.down_proj{end}"),
            false => name(end),
        };
        change(folder.tensors.get_mut(&tensor).unwrap());
        let error = folder.error();
        assert!(
            error.contains(&format!("tensor `{tensor}`")) && error.contains(expected),
            "{error}\n{expected}"
        );
    }
}

#[test]
fn missing_and_contradicting_tensors_are_named() {
    let down = "model.layers.1.mlp.down_proj";
    let name = |end: &str| format!("{down}{end}");
    let gptq = || Folder::of("quant-gptq-int4-g32-actorder-sym-a", "missing-gptq");
    let mut folder = gptq();
    folder.logits(Quantization::Auto).unwrap();
    folder.tensors.remove(&name(".scales"));
    assert!(folder.error().contains(&format!("no tensor `{}`", name(".scales"))));

    let mut folder = gptq();
    let up = folder.tensors[&name(".g_idx")].clone();
    folder.tensors.insert(name(".g_idx2"), up);
    assert!(
        folder.error().contains(&format!(
            "1 tensors that Qwen2ForCausalLM does not have here, `{down}.g_idx2`"
        ))
    );

    let mut folder = gptq();
    folder.tensors.insert(name(".weight"), (Dtype::F16, vec![128, 128], vec![0; 2 * 128 * 128]));
    assert!(folder.error().contains("and an unquantized `weight`"));

    let mut folder = gptq();
    folder.tensors.get_mut(&name(".scales")).unwrap().2[..2]
        .copy_from_slice(&0x7e00u16.to_le_bytes());
    for quantization in [Quantization::None, Quantization::Auto, Quantization::Int4] {
        let error = folder.logits(quantization).unwrap_err();
        assert!(error.contains(down) && error.contains("not finite"), "{error}");
    }

    // AutoGPTQ once wrote a bias of zeros for each matrix.
    let mut folder = gptq();
    let expected = folder.logits(Quantization::Auto).unwrap();
    folder.tensors.insert(name(".bias"), (Dtype::F16, vec![128], vec![0; 256]));
    assert_eq!(folder.logits(Quantization::Auto).unwrap(), expected);
    folder.tensors.get_mut(&name(".bias")).unwrap().2[200] = 1;
    assert!(
        folder.error().contains(&format!(
            "1 tensors that Qwen2ForCausalLM does not have here, `{down}.bias`"
        ))
    );

    // The head of a tied model is never read: quantized or not, nobody would notice.
    let mut folder = gptq();
    for end in [".qweight", ".qzeros", ".scales", ".g_idx"] {
        let tensor = folder.tensors[&name(end)].clone();
        folder.tensors.insert(format!("lm_head{end}"), tensor);
    }
    assert!(
        folder.error().contains("4 tensors that Qwen2ForCausalLM does not have here, `lm_head.")
    );

    // Without its description, a quantized checkpoint has tensors that nobody knows.
    let mut folder = gptq();
    folder.config.as_object_mut().unwrap().remove("quantization_config");
    assert!(folder.error().contains("no tensor `model.layers.0.self_attn.q_proj.weight`"));

    let mut folder = Folder::of("quant-ct-w4a16-g32-asym-a", "missing-ct");
    folder.tensors.remove(&name(".weight_zero_point"));
    let error = folder.error();
    assert!(error.contains(&format!(
        "{}`: found nothing, expected the zero points",
        name(".weight_zero_point")
    )));

    // FP8 without scales.
    let mut folder = Folder::of("quant-fp8-block-moe-a", "missing-fp8");
    folder.tensors.remove("model.layers.0.mlp.experts.2.down_proj.weight_scale_inv");
    let error = folder.error();
    assert!(error.contains("experts.2.down_proj.weight`: found F8_E4M3, expected F32"), "{error}");
}

/// What makes other weights of the same tensors makes another packed cache: here, how zero points are stored.
#[test]
fn the_description_changes_the_weights() {
    let mut folder = Folder::of("quant-gptq-int4-g32-actorder-sym-a", "described");
    let old = folder.logits(Quantization::Auto).unwrap();
    folder.config["quantization_config"]["checkpoint_format"] = json!("gptq_v2");
    assert!(folder.logits(Quantization::Auto).unwrap() != old);
}
