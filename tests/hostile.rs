//! Broken models: every mutation of a valid folder loads or is an error; none panics, hangs or takes memory out of
//! proportion to the files.
#![allow(unsafe_code)] // the counting allocator

use ferrule::model::{
    Chunk, Forward, KvDtype, KvGroup, LoadOptions, NO_PAGE, Quantization, Sees, Wanted, load,
};
use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::*};
use std::sync::{Mutex, MutexGuard};

struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged; only sizes are counted.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Relaxed) + layout.size();
        MOST.fetch_max(now, Relaxed);
        // SAFETY: the caller's promises are the system allocator's.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(p, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// One test at a time: the allocator counts for all.
fn alone() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(|e| e.into_inner())
}

/// A folder that is removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let path = std::env::temp_dir().join(format!("ferrule-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }
    fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.0.join(name), bytes).unwrap();
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % n
    }
}

/// Loads the folder and, if that works, runs three tokens. The logits may be anything but not missing.
fn try_out(folder: &Path, quantization: Quantization) -> Result<(), String> {
    let options = LoadOptions {
        quantization,
        threads: Some(1),
        kv_dtype: KvDtype::F16,
        ..LoadOptions::default()
    };
    let model = load(folder, options).map_err(|e| e.to_string())?;
    let groups = model.kv_groups();
    let mut kv = model.new_kv(&vec![1; groups.len()]).map_err(|e| e.to_string())?;
    let table = |g: &KvGroup| if g.sees == Sees::State { vec![NO_PAGE, 0] } else { vec![0] };
    let pages: Vec<Vec<u32>> = groups.iter().map(table).collect();
    let chunk =
        Chunk { tokens: &[0, 1, 0], start: 0, long: false, pages: &pages, wanted: Wanted::Last };
    let logits =
        model.forward(&mut kv, &[chunk], &AtomicBool::new(false)).map_err(|e| e.to_string())?;
    assert_eq!(logits.len(), model.vocab());
    Ok(())
}

#[test]
fn a_thousand_mutations_of_a_valid_checkpoint() {
    mutations("qwen3-a", 1000);
}

#[test]
fn mutations_of_checkpoints_with_states() {
    mutations("lfm3-a", 300);
    mutations("qwen35-a", 300);
}

#[test]
fn mutations_of_quantized_checkpoints() {
    mutations("quant-gptq-int4-g32-actorder-sym-a", 300);
    mutations("quant-ct-w4a16-g32-asym-a", 200);
    mutations("quant-bnb-nf4-double-a", 200);
    mutations("quant-fp8-block-moe-a", 200);
}

fn mutations(name: &str, rounds: usize) {
    let _alone = alone();
    let source = golden(name);
    let weights = fs::read(source.join("model.safetensors")).unwrap();
    let config = fs::read(source.join("config.json")).unwrap();
    let header = 8 + u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
    let scratch = Scratch::new(&format!("mutations-{name}"));
    scratch.write("model.safetensors", &weights);
    scratch.write("config.json", &config);
    try_out(&scratch.0, Quantization::Int4).unwrap();
    let mut random = Random(1);
    let (mut good, mut bad) = (0, 0);
    let before = NOW.load(Relaxed);
    for round in 0..rounds {
        let (mut w, mut c) = (weights.clone(), config.clone());
        for _ in 0..1 + random.below(3) {
            match random.below(6) {
                0 => w.truncate(random.below(w.len())),
                1 => w.extend(vec![random.below(256) as u8; random.below(5000)]),
                2 if !w.is_empty() => {
                    let at = random.below(w.len());
                    w[at] ^= 1 << random.below(8);
                }
                3 if !c.is_empty() => {
                    let at = random.below(c.len());
                    c[at] = b"0123456789{}[]\",:.-enul "[random.below(24)];
                }
                _ if w.len() > header => {
                    let at = random.below(header);
                    w[at] = b"0123456789{}[]\",:FBI "[random.below(21)];
                }
                _ => w.clear(),
            }
        }
        scratch.write("model.safetensors", &w);
        scratch.write("config.json", &c);
        MOST.store(NOW.load(Relaxed), Relaxed);
        use Quantization::{Auto, Int4, Int8, None};
        let quantization = [None, Int8, Int4, Auto][round % 4];
        match try_out(&scratch.0, quantization) {
            Ok(()) => good += 1,
            Err(_) => bad += 1,
        }
        let used = MOST.load(Relaxed).saturating_sub(before);
        assert!(used <= 4 * (w.len() + weights.len()) + (64 << 20), "round {round}: {used} bytes");
    }
    assert!(
        good > rounds / 20 && bad > rounds / 4,
        "{name}: {good} loaded, {bad} were refused: the mutations miss their mark"
    );
}

#[test]
fn a_weight_that_is_not_finite_is_named() {
    let _alone = alone();
    let source = golden("qwen3-a");
    let mut weights = fs::read(source.join("model.safetensors")).unwrap();
    let end = weights.len();
    weights[end - 2..].copy_from_slice(&0x7fc0u16.to_le_bytes()); // bf16 NaN, in the last tensor of the file
    let scratch = Scratch::new("nan");
    scratch.write("model.safetensors", &weights);
    scratch.write("config.json", &fs::read(source.join("config.json")).unwrap());
    for quantization in [Quantization::None, Quantization::Int4] {
        let error = try_out(&scratch.0, quantization).unwrap_err();
        assert!(error.contains("not finite") && error.contains("tensor `"), "{error}");
    }
}

#[test]
fn absurd_and_missing_facts_are_errors_that_name_them() {
    let _alone = alone();
    let source = golden("qwen3-a");
    let scratch = Scratch::new("config");
    scratch.write("model.safetensors", &fs::read(source.join("model.safetensors")).unwrap());
    let text = fs::read_to_string(source.join("config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&text).unwrap();
    let cases = [
        ("hidden_size", serde_json::json!(1u64 << 60)),
        ("hidden_size", serde_json::json!(-64)),
        ("hidden_size", serde_json::json!("64")),
        ("num_hidden_layers", serde_json::json!(0)),
        ("num_hidden_layers", serde_json::json!(5000)),
        ("num_attention_heads", serde_json::json!(3)),
        ("vocab_size", serde_json::json!(16_000_000)),
        ("rms_norm_eps", serde_json::json!(null)),
        ("head_dim", serde_json::json!(33)),
        ("architectures", serde_json::json!(["NoSuchModel"])),
        ("hidden_act", serde_json::json!("relu6")),
        ("rope_scaling", serde_json::json!({"rope_type": "spiral", "factor": 2.0})),
        ("num_experts", serde_json::json!(8)),
    ];
    for (key, value) in cases {
        let mut config = config.clone();
        config[key] = value.clone();
        scratch.write("config.json", config.to_string().as_bytes());
        let error = try_out(&scratch.0, Quantization::None).unwrap_err();
        let text = |v: &serde_json::Value| v.as_str().map_or(v.to_string(), str::to_owned);
        let told = [text(&value), text(&value[0]), text(&value["rope_type"])];
        let told = told.iter().any(|t| t != "null" && error.contains(t));
        assert!(
            told || error.contains(key) || error.contains("tensor"),
            "{key} = {value}: {error}"
        );
    }
    for key in
        ["hidden_size", "num_attention_heads", "vocab_size", "intermediate_size", "architectures"]
    {
        let mut config = config.clone();
        config.as_object_mut().unwrap().remove(key);
        scratch.write("config.json", config.to_string().as_bytes());
        let error = try_out(&scratch.0, Quantization::None).unwrap_err();
        assert!(error.contains(key), "{key}: {error}");
    }
}

#[test]
fn the_packed_cache_survives_truncation_and_nonsense() {
    let _alone = alone();
    // Larger than what the cache is for, so that it is used: 8192 x 4096 in bf16.
    let scratch = Scratch::new("cache");
    let cache = scratch.0.join("cache");
    let model = scratch.0.join("model");
    fs::create_dir_all(&model).unwrap();
    big_model(&model);
    let open = || {
        let options = LoadOptions {
            quantization: Quantization::Int8,
            cache_dir: Some(cache.clone()),
            ..LoadOptions::default()
        };
        let model = load(&model, options).unwrap();
        let mut kv = model.new_kv(&[1]).unwrap();
        let pages = [vec![0]];
        let chunk = Chunk {
            tokens: &[1, 2, 3],
            start: 0,
            long: false,
            pages: &pages,
            wanted: Wanted::Last,
        };
        model.forward(&mut kv, &[chunk], &AtomicBool::new(false)).unwrap()
    };
    let expected = open();
    let file = || {
        let mut all: Vec<_> = fs::read_dir(&cache).unwrap().map(|e| e.unwrap().path()).collect();
        assert_eq!(all.len(), 1, "one file, no leftovers");
        all.remove(0)
    };
    let whole = fs::read(file()).unwrap();
    assert_eq!(open(), expected, "from the cache");
    fs::write(file(), &whole[..whole.len() / 2]).unwrap();
    assert_eq!(open(), expected, "after a truncated file");
    assert_eq!(fs::read(file()).unwrap(), whole, "written anew");
    fs::write(file(), b"nonsense").unwrap();
    assert_eq!(open(), expected, "after nonsense");
    let mut other = whole.clone();
    other[20] ^= 1;
    fs::write(file(), &other).unwrap();
    assert_eq!(open(), expected, "after another key");
    // Several writers at once, in one process: each gives the right answer, one whole file is left.
    fs::remove_file(file()).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| assert_eq!(open(), expected));
        }
    });
    assert_eq!(fs::read(file()).unwrap(), whole, "after three writers");
}

/// A one-layer Llama whose packed weights exceed the size that is worth caching.
fn big_model(folder: &Path) {
    let (vocab, hidden, ffn) = (16384usize, 2048usize, 8192usize);
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": ffn, "num_hidden_layers": 1, "num_attention_heads": 16,
        "num_key_value_heads": 4, "vocab_size": vocab, "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": true
    });
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let shapes = [
        ("model.embed_tokens.weight", vec![vocab, hidden]),
        ("model.layers.0.input_layernorm.weight", vec![hidden]),
        ("model.layers.0.mlp.down_proj.weight", vec![hidden, ffn]),
        ("model.layers.0.mlp.gate_proj.weight", vec![ffn, hidden]),
        ("model.layers.0.mlp.up_proj.weight", vec![ffn, hidden]),
        ("model.layers.0.post_attention_layernorm.weight", vec![hidden]),
        ("model.layers.0.self_attn.k_proj.weight", vec![512, hidden]),
        ("model.layers.0.self_attn.o_proj.weight", vec![hidden, hidden]),
        ("model.layers.0.self_attn.q_proj.weight", vec![hidden, hidden]),
        ("model.layers.0.self_attn.v_proj.weight", vec![512, hidden]),
        ("model.norm.weight", vec![hidden]),
    ];
    let mut random = Random(3);
    let noise: Vec<u8> = (0..1 << 20)
        .flat_map(|_| (0x3c00u16 | (random.below(0x8000) as u16 & 0x80ff)).to_le_bytes())
        .collect();
    let data: Vec<(&str, Vec<usize>, Vec<u8>)> = shapes
        .into_iter()
        .map(|(name, shape)| {
            let bytes = 2 * shape.iter().product::<usize>();
            (name, shape, noise.iter().copied().cycle().take(bytes).collect())
        })
        .collect();
    let views = data.iter().map(|(name, shape, bytes)| {
        let view =
            safetensors::tensor::TensorView::new(safetensors::Dtype::BF16, shape.clone(), bytes);
        (*name, view.unwrap())
    });
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
}
