//! Small models made up here: where weights are in one tensor or several, in blocks or not.

use super::models::{Session, options};
use super::write::Writer;
use super::{Folder, message};
use ferrule::model::{Quantization, Wanted, load};
use ferrule::quant::Blocks;

const F32: u32 = 0;
const Q8_0: u32 = 8;

/// A tensor's name, its shape with the innermost dimension first, its type.
type Tensor<'a> = (&'a str, &'a [u64], u32);

/// Noise in every tensor; of blocks either these or, `decoded`, the numbers that they stand for.
fn file(architecture: &str, keys: &[(&str, u32)], tensors: &[Tensor<'_>], decoded: bool) -> Writer {
    let mut writer = Writer::default().text("general.architecture", architecture);
    for (key, value) in keys {
        writer = writer.u32(&format!("{architecture}.{key}"), *value);
    }
    let eps = format!("{architecture}.attention.layer_norm_rms_epsilon");
    writer = writer.item(&eps, 6, 1e-5f32.to_le_bytes());
    let mut seed = 7u32;
    let mut noise = || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 24) as i8
    };
    for &(name, dims, kind) in tensors {
        let n = dims.iter().product::<u64>() as usize;
        let floats = |values: &[f32]| values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let block = |_| {
            let scale = half::f16::from_f32(1.0 / 256.0).to_le_bytes();
            let codes = std::iter::repeat_with(|| noise() as u8).take(32);
            scale.into_iter().chain(codes).collect::<Vec<u8>>()
        };
        let blocks = || (0..n / 32).flat_map(block).collect::<Vec<u8>>();
        let (kind, bytes): (u32, Vec<u8>) = match (kind, decoded) {
            (F32, _) => {
                let values: Vec<f32> = (0..n).map(|_| f32::from(noise()) / 256.0).collect();
                (F32, floats(&values))
            }
            (kind, false) => (kind, blocks()),
            (_, true) => {
                let mut values = vec![0.0; n];
                Blocks::Q8_0.decode(&blocks(), &mut values);
                (F32, floats(&values))
            }
        };
        writer = writer.tensor(name, dims, kind, &bytes);
    }
    writer
}

const KEYS: &[(&str, u32)] = &[
    ("block_count", 1),
    ("context_length", 64),
    ("embedding_length", 64),
    ("feed_forward_length", 32),
    ("attention.head_count", 4),
];

/// The last logits of a file, as bits.
fn logits(folder: &Folder, file: &Writer, quantization: Quantization) -> Vec<u32> {
    let path = folder.write("m.gguf", file.bytes());
    let model = load(&path, options(quantization)).unwrap();
    let logits = Session::new(&model).feed(&[1, 5, 3, 2], Wanted::All);
    assert!(logits.iter().all(|x| x.is_finite()) && logits.iter().any(|x| *x != logits[0]));
    logits.iter().map(|x| x.to_bits()).collect()
}

/// What keys are made with is read by columns.
#[test]
fn columns_of_blocks_are_those_of_their_numbers() {
    let keys = [
        KEYS,
        &[
            ("attention.kv_lora_rank", 32),
            ("attention.q_lora_rank", 32),
            ("attention.key_length", 24),
            ("rope.dimension_count", 8),
        ],
    ]
    .concat();
    let tensors: &[Tensor<'_>] = &[
        ("token_embd.weight", &[64, 16], F32),
        ("output_norm.weight", &[64], F32),
        ("blk.0.attn_norm.weight", &[64], F32),
        ("blk.0.attn_q_a.weight", &[64, 32], Q8_0),
        ("blk.0.attn_q_a_norm.weight", &[32], F32),
        ("blk.0.attn_q_b.weight", &[32, 96], Q8_0),
        ("blk.0.attn_kv_a_mqa.weight", &[64, 40], Q8_0),
        ("blk.0.attn_kv_a_norm.weight", &[32], F32),
        ("blk.0.attn_kv_b.weight", &[32, 128], Q8_0),
        ("blk.0.attn_output.weight", &[64, 64], Q8_0),
        ("blk.0.ffn_norm.weight", &[64], F32),
        ("blk.0.ffn_gate.weight", &[64, 32], Q8_0),
        ("blk.0.ffn_up.weight", &[64, 32], Q8_0),
        ("blk.0.ffn_down.weight", &[32, 64], Q8_0),
    ];
    let folder = Folder::new();
    let [blocks, numbers] = [false, true].map(|decoded| file("minicpm3", &keys, tensors, decoded));
    for quantization in [Quantization::None, Quantization::Int8, Quantization::Int4] {
        let found = logits(&folder, &blocks, quantization);
        assert_eq!(found, logits(&folder, &numbers, quantization), "{quantization:?}");
    }
    logits(&folder, &blocks, Quantization::Auto);
}

/// A Phi 3 with so many key/value heads.
fn phi3(kv_heads: u32, bias: bool, more: &[(&str, u32)]) -> Writer {
    let keys = [KEYS, &[("attention.head_count_kv", kv_heads)], more].concat();
    let qkv = [64, 64 + 2 * 16 * u64::from(kv_heads)];
    let mut tensors: Vec<Tensor<'_>> = vec![
        ("token_embd.weight", &[64, 16], F32),
        ("output_norm.weight", &[64], F32),
        ("blk.0.attn_norm.weight", &[64], F32),
        ("blk.0.attn_qkv.weight", &qkv, Q8_0),
        ("blk.0.attn_output.weight", &[64, 64], F32),
        ("blk.0.ffn_norm.weight", &[64], F32),
        ("blk.0.ffn_up.weight", &[64, 64], F32),
        ("blk.0.ffn_down.weight", &[32, 64], F32),
    ];
    if bias {
        tensors.push(("blk.0.attn_qkv.bias", &qkv[1..], Q8_0));
    }
    file("phi3", &keys, &tensors, false)
}

/// A vector in blocks, of which keys and values have halves.
#[test]
fn half_a_block_is_an_error() {
    let folder = Folder::new();
    let open =
        |file: Writer| load(&folder.write("m.gguf", file.bytes()), options(Quantization::Auto));
    open(phi3(1, false, &[])).unwrap();
    open(phi3(2, true, &[])).unwrap();
    let found = message(open(phi3(1, true, &[])));
    assert!(found.contains("`blk.0.attn_qkv.bias`: found Q8_0"), "{found}");
    assert!(found.contains("not whole blocks"), "{found}");
}

/// Layers for drafting are no layers of the model.
#[test]
fn layers_behind_the_last_are_left_out() {
    let folder = Folder::new();
    let behind = |file: Writer| file.tensor("blk.1.nextn.eh_proj.weight", &[1], F32, &[0; 4]);
    let plain = phi3(2, false, &[]);
    let drafting = phi3(2, false, &[("nextn_predict_layers", 1)]);
    let mut two = behind(drafting);
    let count = two.items.iter().position(|item| item[8..].starts_with(b"phi3.block_count"));
    let item = &mut two.items[count.unwrap()];
    let at = item.len() - 4;
    item[at] = 2;
    let expected = logits(&folder, &plain, Quantization::Auto);
    assert_eq!(logits(&folder, &two, Quantization::Auto), expected);
    let path = folder.write("m.gguf", behind(plain).bytes());
    let found = message(load(&path, options(Quantization::Auto)));
    assert!(found.contains("`blk.1.nextn.eh_proj.weight` first"), "{found}");
}
