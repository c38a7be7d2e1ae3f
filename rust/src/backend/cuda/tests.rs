//! What can be said of the embedded kernels without a device: the PTX is what the launch structs think, and weights
//! come back from their tiles.

use super::modules::{MODULES, Module};
use super::{launch, pack};
use crate::backend::cpu::Cpu;
use crate::backend::{Backend, Form, Part, Parts};
use crate::quant::Grouped;
use std::collections::BTreeMap;

#[test]
fn every_kernel_is_in_the_ptx_with_the_parameter_that_is_launched() {
    let launched: BTreeMap<_, _> = launch::sizes().into_iter().collect();
    let capabilities = [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0)];
    for capability in capabilities {
        let mut found = BTreeMap::new();
        for module in MODULES {
            let image = module.image(capability).unwrap();
            assert!(image.contains("\n.version 8.2\n.target sm_80\n"), "{}", module.name);
            assert!(!image.contains(".extern"), "{}: an unresolved function", module.name);
            let entries: Vec<_> = Module::entries(image).collect();
            assert_eq!(entries.len(), image.matches(".entry ").count(), "{}", module.name);
            found.extend(entries);
        }
        assert_eq!(found, launched);
    }
    assert!(MODULES.iter().all(|module| module.image((7, 5)).is_none()));
}

#[test]
fn weights_come_back_from_their_tiles() {
    let cpu = Cpu::new(1, None).unwrap();
    for (n, k) in [(1, 1), (16, 32), (17, 33), (40, 300), (96, 256), (70, 520)] {
        let mut state = 1u32;
        let next = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        let values: Vec<f32> = (0..n * k).map(next).collect();
        let f32_bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let f16 = |x: &f32| half::f16::from_f32(*x).to_le_bytes();
        let f16_bytes: Vec<u8> = values.iter().flat_map(f16).collect();
        for form in [Form::Q4, Form::Q8, Form::Bf16, Form::F16, Form::F32] {
            let (stored, bytes) = match form {
                Form::Bf16 | Form::F16 => (form, &f16_bytes),
                _ => (Form::F32, &f32_bytes),
            };
            let parts = vec![Part::floats(stored, n, k, bytes)];
            let parts = Parts { parts, k, interleaved: false };
            let mat = cpu.pack(form, &parts).unwrap().unwrap();
            let mut tiles = vec![0xaa; pack::bytes(form, n, k).unwrap()];
            pack::tiles(form, k, mat.bytes(), &mut tiles);
            let mut back = vec![0; mat.bytes().len()];
            pack::packed(form, k, &tiles, &mut back);
            assert!(back == mat.bytes(), "{form:?} [{n}, {k}]");
        }
    }
    assert_eq!(pack::bytes(Form::GroupedFloat(Grouped::MXFP4), 32, 32), None);
    // ggml's own bits a weight, but for the minima of Q4_K and Q5_K, which have 8 bits and not 6.
    let bits = |how| pack::bytes(Form::Grouped(how), 4096, 4096).unwrap() as f64 / 2048.0 / 1024.0;
    let found = [Grouped::Q4_0, Grouped::Q4_K, Grouped::Q5_K, Grouped::Q6_K, Grouped::MXFP4];
    assert_eq!(found.map(bits), [4.5, 4.625, 5.625, 6.625, 4.25]);
    // 4.5 bits a weight.
    assert_eq!(pack::bytes(Form::Q4, 4096, 4096).unwrap() * 8, 4096 * 4096 * 9 / 2);
}
