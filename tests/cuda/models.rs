//! Whole models on the emulated device: the logits of the CPU back end, bit for bit.

use ferrule::Error;
use ferrule::backend::Backend;
use ferrule::backend::cuda::Split;
use ferrule::file::Checkpoint;
use ferrule::model::{
    Chunk, Forward, KvDtype, KvGroup, LoadOptions, Model, PAGE, Quantization, Sees, Wanted, load,
    load_cuda, load_onto, open_cuda,
};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

/// The goldens with weights as they were trained, not quantized.
fn goldens() -> Vec<PathBuf> {
    let name = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().into_owned();
    super::goldens::goldens().into_iter().filter(|path| !name(path).starts_with("quant-")).collect()
}

fn options(quantization: Quantization, kv_dtype: KvDtype) -> LoadOptions {
    LoadOptions { quantization, kv_dtype, threads: Some(1), ..LoadOptions::default() }
}

fn ids(folder: &Path, name: &str) -> Vec<u32> {
    let golden = Checkpoint::open(&folder.join("golden.safetensors")).unwrap();
    let tensor = golden.tensor(name).unwrap();
    tensor.bytes.chunks(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// A prompt in two chunks beside another sequence, then four tokens of both: all logits of the first.
fn answers<B: Backend>(model: &Model<B>, ids: &[u32]) -> Vec<u32> {
    let groups = model.kv_groups();
    let table = |pages: &[u32]| -> Vec<Vec<u32>> {
        let of = |g: &KvGroup| if g.sees == Sees::State { &pages[..2] } else { pages }.to_vec();
        groups.iter().map(of).collect()
    };
    let (a, b) = (table(&[0, 2, 4]), table(&[5, 3, 1]));
    let mut kv = model.new_kv(&vec![6; groups.len()]).unwrap();
    let (prompt, rest) = ids.split_at(ids.len() - 4);
    let half = prompt.len() / 2;
    assert!(ids.len() <= 3 * PAGE);
    let mut found = Vec::new();
    let mut step = |tokens: &[u32], start, other: &[u32], other_start| {
        let chunk =
            |tokens, start, pages, wanted| Chunk { tokens, start, long: false, pages, wanted };
        let batch =
            [chunk(tokens, start, &a, Wanted::All), chunk(other, other_start, &b, Wanted::Last)];
        let all = model.forward(&mut kv, &batch, &AtomicBool::new(false)).unwrap();
        found.extend(bits(&all));
    };
    step(&prompt[..half], 0, &ids[3..10], 0);
    step(&prompt[half..], half, &ids[10..11], 7);
    for (i, id) in rest.iter().enumerate() {
        step(&[*id], prompt.len() + i, &ids[11 + i..12 + i], 8 + i);
    }
    found
}

#[test]
#[ignore = "on the emulated driver: see main.rs"]
fn logits() {
    let (mut tested, mut refused) = (0, Vec::new());
    for folder in goldens() {
        let ids = &ids(&folder, "p130.ids")[..70];
        let mut settings = vec![
            (Quantization::None, KvDtype::F32),
            (Quantization::Int8, KvDtype::Int8),
            (Quantization::Int4, KvDtype::F16),
        ];
        if ["qwen3-a", "deepseek-v3-a"].iter().any(|name| folder.ends_with(name)) {
            settings.push((Quantization::Int5, KvDtype::F16));
            settings.push((Quantization::Int6, KvDtype::Int8));
        }
        for (quantization, kv_dtype) in settings {
            let cuda = match load_cuda(&folder, None, options(quantization, kv_dtype)) {
                Ok(cuda) => cuda,
                Err(Error::Unsupported(_)) => {
                    refused.push(folder.file_name().unwrap().to_owned());
                    break;
                }
                Err(error) => panic!("{folder:?}: {error}"),
            };
            let cpu = load(&folder, options(quantization, kv_dtype)).unwrap();
            let (found, expected) = (answers(&cuda, ids), answers(&cpu, ids));
            let first = found.iter().zip(&expected).position(|(f, e)| f != e);
            assert!(first.is_none(), "{folder:?} {quantization:?} {kv_dtype:?}: number {first:?}");
            tested += 1;
        }
    }
    println!("{tested} models; not on CUDA: {refused:?}");
    assert!(tested >= 27);
}

/// Models whose files are quantized, as they are.
#[test]
#[ignore = "on the emulated driver: see main.rs"]
fn quantized() {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let shared = std::env::var_os("FERRULE_SHARED").map(|at| Path::new(&at).join("goldens"));
    let folders = [Some(own), shared].into_iter().flatten().flat_map(|folder| {
        let mut all: Vec<_> =
            std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        all.sort();
        all
    });
    // A folder, or each GGUF file in it.
    let paths = folders.flat_map(|folder| {
        let files = std::fs::read_dir(&folder).into_iter().flatten();
        let files = files.map(|entry| entry.unwrap().path());
        let mut all: Vec<_> = files.filter(|p| p.extension() == Some("gguf".as_ref())).collect();
        all.sort();
        if all.is_empty() { vec![folder] } else { all }
    });
    let (mut tested, mut refused) = (Vec::new(), Vec::new());
    for folder in paths {
        let name = folder.to_string_lossy().rsplit_once("golden").unwrap().1.to_owned();
        let known = ["/gguf-", "/quant-"].iter().any(|kind| name.contains(kind));
        let name = name.trim_start_matches('s').to_owned();
        if !known || name.contains("gguf-blocks-a") || tested.contains(&name) {
            continue;
        }
        let options = || options(Quantization::Auto, KvDtype::F16);
        let cuda = match load_cuda(&folder, None, options()) {
            Ok(cuda) => cuda,
            Err(Error::Unsupported(why)) => {
                refused.push((name, why));
                continue;
            }
            Err(error) => panic!("{folder:?}: {error}"),
        };
        let cpu = load(&folder, options()).unwrap();
        let ids: Vec<u32> = (0..70).map(|i: usize| (i * i * 7 % cpu.spec.vocab) as u32).collect();
        let (found, expected) = (answers(&cuda, &ids), answers(&cpu, &ids));
        let first = found.iter().zip(&expected).position(|(f, e)| f != e);
        assert!(first.is_none(), "{folder:?} {}: number {first:?}", cuda.form());
        tested.push(name);
    }
    println!("{tested:?}; not on CUDA: {refused:?}");
    assert!(tested.len() >= 3);
}

/// The same model cut in two at several places: the CPU's bits, and the residual stream crosses once a step.
#[test]
#[ignore = "on the emulated driver: see main.rs"]
fn split() {
    let mut tested = 0;
    for (number, folder) in goldens().into_iter().enumerate() {
        let ids = &ids(&folder, "p130.ids")[..70];
        let (quantization, kv_dtype) = [
            (Quantization::Int4, KvDtype::F16),
            (Quantization::Int8, KvDtype::Int8),
            (Quantization::None, KvDtype::F32),
        ][number % 3];
        let options = || options(quantization, kv_dtype);
        let cpu = load(&folder, options()).unwrap();
        if cpu.spec.runs_on_cuda().is_err() {
            continue;
        }
        let expected = answers(&cpu, ids);
        let layers = cpu.spec.layers.len();
        for border in BTreeSet::from([0, 1, layers / 2, layers - 1]) {
            let cuda = open_cuda(None, &options()).unwrap();
            let model = load_onto(&folder, Split::new(cuda, border), options()).unwrap();
            let found = answers(&model, ids);
            let first = found.iter().zip(&expected).position(|(f, e)| f != e);
            assert!(first.is_none(), "{folder:?} {quantization:?} {border}: number {first:?}");
            // Six steps. Gemma 3n and 4 have more than one stream, and layers that read the keys of earlier ones.
            let moves = model.backend.moves();
            let plain = cpu.spec.gemma.is_none();
            assert!(if plain { moves == 6 } else { moves >= 6 }, "{folder:?} {border}: {moves}");
            tested += 1;
        }
    }
    println!("{tested} splits");
    assert!(tested >= 32);
}

#[test]
#[ignore = "on the emulated driver: see main.rs"]
fn generation_by_graphs() {
    fn token_by_token<B: Backend>(model: &Model<B>, ids: &[u32]) -> Vec<u32> {
        let groups = model.kv_groups();
        let mut kv = model.new_kv(&vec![3; groups.len()]).unwrap();
        let mut step = |(start, id): (usize, &u32)| {
            // A state is read from one page and goes to another.
            let [read, write] = [start as u32 % 2, 1 - start as u32 % 2];
            let of = |g: &KvGroup| match g.sees {
                Sees::State => vec![read, write],
                _ => vec![2, 0, 1],
            };
            let tables: Vec<_> = groups.iter().map(of).collect();
            let tokens = std::slice::from_ref(id);
            let chunk = Chunk { tokens, start, long: false, pages: &tables, wanted: Wanted::Last };
            bits(&model.forward(&mut kv, &[chunk], &AtomicBool::new(false)).unwrap())
        };
        ids.iter().enumerate().flat_map(|(start, id)| step((start, id))).collect()
    }
    for folder in goldens() {
        if !["llama31-a", "deepseek-v3-a", "qwen35-a"].iter().any(|name| folder.ends_with(name)) {
            continue;
        }
        let ids = ids(&folder, "p130.ids");
        let cuda = load_cuda(&folder, None, options(Quantization::Int4, KvDtype::F16)).unwrap();
        let cpu = load(&folder, options(Quantization::Int4, KvDtype::F16)).unwrap();
        assert!(token_by_token(&cuda, &ids[..24]) == token_by_token(&cpu, &ids[..24]));
    }
}

#[test]
#[ignore = "on the emulated driver: see main.rs"]
fn refused() {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let whole = LoadOptions { quantization: Quantization::None, ..LoadOptions::default() };
    let found = load_cuda(&own.join("quant-gpt-oss-mxfp4-a"), None, whole).err().unwrap();
    let what = "use quantization=\"auto\"";
    assert!(matches!(&found, Error::Unsupported(text) if text.contains(what)), "{found}");
    let found = load_cuda(&own.join("qwen3-a"), Some(3), LoadOptions::default()).err().unwrap();
    assert_eq!(found.to_string(), "device: found cuda:3, expected cuda:0");
}

#[test]
#[ignore = "on the emulated driver: see main.rs"]
fn short_of_memory() {
    let folder = goldens().remove(0);
    let found = load_cuda(&folder, None, options(Quantization::Int8, KvDtype::F16)).err().unwrap();
    assert!(matches!(found, Error::OutOfMemory { .. }), "{found}");
}

#[test]
#[ignore = "on the emulated driver: see main.rs"]
fn faulty() {
    let folder = goldens().remove(0);
    let model = load_cuda(&folder, None, options(Quantization::Int8, KvDtype::F16)).unwrap();
    let tables = vec![vec![0]; model.kv_groups().len()];
    let mut kv = model.new_kv(&vec![1; tables.len()]).unwrap();
    let mut step = |start| {
        let chunk =
            Chunk { tokens: &[1], start, long: false, pages: &tables, wanted: Wanted::Last };
        model.forward(&mut kv, &[chunk], &AtomicBool::new(false))
    };
    let first = (0..PAGE).find_map(|start| step(start).err()).unwrap();
    assert!(matches!(&first, Error::Device(what) if what.contains("LAUNCH_FAILED")), "{first}");
    // It stays broken, and says so.
    assert!(matches!(step(0), Err(Error::Device(_))));
}
