//! Layers with a state against the formulas of [`Core`] in f64, position by position; and the same bits however a
//! sequence is cut, with whom it is in a batch, and with any number of threads.

use super::*;
use crate::backend::Backend;

fn noise(n: usize, seed: u32) -> Vec<f32> {
    let mut seed = seed.wrapping_mul(747_796_405);
    let next = || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(n).collect()
}

struct Case {
    how: Recurrent,
    taps: Vec<f32>,
    bias: Option<Vec<f32>>,
    rows: Option<HeadRows<Vec<f32>>>,
}

const EPS: f32 = 1e-5;

fn cases() -> Vec<Case> {
    let h = |heads, groups, tiled, key_dim, value_dim| Heads {
        heads,
        groups,
        tiled,
        key_dim,
        value_dim,
    };
    let cores = [
        (3, Core::Gated(1100)),
        (2, Core::Gated(5)),
        (4, Core::DeltaNet(h(4, 2, false, 12, 32))),
        (4, Core::DeltaNet(h(6, 2, true, 12, 16))),
        (4, Core::Mamba2(h(6, 2, false, 20, 16))),
    ];
    let case = |(width, core)| {
        let how = Recurrent { width, core };
        let (_, channels) = how.channels();
        let rows = match core {
            Core::Gated(_) => None,
            Core::DeltaNet(h) | Core::Mamba2(h) => {
                let delta = matches!(core, Core::DeltaNet(_));
                Some(HeadRows {
                    decay: noise(h.heads, 3).iter().map(|x| -x.abs()).collect(),
                    dt_bias: noise(h.heads, 4),
                    skip: (!delta).then(|| noise(h.heads, 5)),
                    norm: noise(if delta { h.value_dim } else { h.values() }, 6),
                })
            }
        };
        let bias = (!matches!(core, Core::DeltaNet(_))).then(|| noise(channels, 2));
        Case { how, taps: noise(width * channels, 1), bias, rows }
    };
    cores.into_iter().map(case).collect()
}

/// Some positions of sequences: the sequence, its first position and their number.
type Part = (usize, usize, usize);

impl Case {
    fn input(&self, sequence: usize, len: usize) -> Vec<f32> {
        noise(len * self.how.projection(), 10 + sequence as u32)
    }

    fn rates(&self, sequence: usize, len: usize) -> Vec<f32> {
        noise(len * self.how.rates(), 20 + sequence as u32)
    }

    /// Runs batches of parts; what comes out of each sequence. State `2 s` or `2 s + 1` is that of sequence `s`.
    fn run(&self, threads: usize, batches: &[Vec<Part>]) -> Vec<Vec<f32>> {
        let cpu = Cpu::new(threads, None).unwrap();
        let mut states = cpu.states(&[(0, 0), (8, self.how.state())]).unwrap();
        let (mut conv, mut out) = (cpu.buf(), cpu.buf());
        let (mut all, mut turn) = (vec![Vec::new(); 4], [0; 4]);
        let width = self.how.projection();
        for batch in batches {
            let tables: Vec<[u32; 2]> = batch
                .iter()
                .map(|&(s, ..)| {
                    turn[s] = 1 - turn[s];
                    [2 * s as u32 + turn[s], 2 * s as u32 + 1 - turn[s]]
                })
                .collect();
            let (mut x, mut rates, mut spans) = (Vec::new(), Vec::new(), Vec::new());
            for (&(s, start, len), table) in batch.iter().zip(&tables) {
                spans.push(Span { first_row: x.len() / width, len, start, table });
                x.extend_from_slice(&self.input(s, start + len)[start * width..]);
                rates.extend_from_slice(&self.rates(s, start + len)[start * self.how.rates()..]);
            }
            let mut x = Buf::new(x, width);
            let bias = self.bias.as_ref();
            cpu.conv(&mut x, &self.how, &self.taps, bias, &mut states, 1, &spans, &mut conv);
            if let Some(rows) = &self.rows {
                let rates = Buf::new(rates, self.how.rates());
                cpu.recur(
                    &x,
                    &rates,
                    &mut conv,
                    &self.how,
                    &rows.as_ref(),
                    EPS,
                    &mut states,
                    1,
                    &spans,
                    &mut out,
                );
            }
            let found = if self.rows.is_some() { &out } else { &conv };
            for (span, &(s, ..)) in spans.iter().zip(batch) {
                let n = self.how.output();
                all[s].extend_from_slice(&found.values()[span.first_row * n..][..span.len * n]);
            }
        }
        all
    }

    /// The formulas, in f64.
    fn expected(&self, sequence: usize, len: usize) -> Vec<f64> {
        let silu = |x: f64| x / (1.0 + (-x).exp());
        let softplus = |x: f64| x.exp().ln_1p();
        let rms = |x: &[f64], gain: &[f32]| -> Vec<f64> {
            let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
            let inv = 1.0 / (mean + f64::from(EPS)).sqrt();
            x.iter().zip(gain).map(|(x, &g)| x * inv * f64::from(g)).collect()
        };
        let (first, n) = self.how.channels();
        let x: Vec<f64> = self.input(sequence, len).iter().map(|&x| f64::from(x)).collect();
        let row = |t: usize| &x[t * self.how.projection()..][..self.how.projection()];
        let gated = matches!(self.how.core, Core::Gated(_));
        let u = |t: usize, c: usize| row(t)[first + c] * if gated { row(t)[c] } else { 1.0 };
        let conv = |t: usize, c: usize| -> f64 {
            let seen = (0..self.how.width).filter(|j| t + j + 1 >= self.how.width);
            let tap = |j: usize| f64::from(self.taps[j * n + c]);
            let sum: f64 = seen.map(|j| tap(j) * u(t + j + 1 - self.how.width, c)).sum();
            sum + self.bias.as_ref().map_or(0.0, |bias| f64::from(bias[c]))
        };
        let (Some(w), Core::DeltaNet(h) | Core::Mamba2(h)) = (&self.rows, self.how.core) else {
            return (0..len * n).map(|i| conv(i / n, i % n) * row(i / n)[n + i % n]).collect();
        };
        let delta = w.skip.is_none();
        let (keys, values, dk, dv) = (h.keys(), h.values(), h.key_dim, h.value_dim);
        let rates = self.rates(sequence, len);
        let mut states = vec![vec![0.0; dk * dv]; h.heads];
        let mut all = Vec::new();
        for t in 0..len {
            let c: Vec<f64> = (0..n).map(|c| silu(conv(t, c))).collect();
            let [q, k, v] = if delta { [0, keys, 2 * keys] } else { [values + keys, values, 0] };
            let mut outs = Vec::new();
            for (i, state) in states.iter_mut().enumerate() {
                let group = if h.tiled { i % h.groups } else { i / (h.heads / h.groups) } * dk;
                let (mut q, mut k) = (c[q + group..][..dk].to_vec(), c[k + group..][..dk].to_vec());
                let v = &c[v + i * dv..][..dv];
                let rates = &rates[t * self.how.rates()..][..self.how.rates()];
                let dt = softplus(f64::from(rates[rates.len() - h.heads + i] + w.dt_bias[i]));
                let (decay, mut beta) = ((f64::from(w.decay[i]) * dt).exp(), dt);
                if delta {
                    for (x, scale) in [(&mut q, (dk as f64).sqrt()), (&mut k, 1.0)] {
                        let length = (x.iter().map(|x| x * x).sum::<f64>() + 1e-6).sqrt() * scale;
                        x.iter_mut().for_each(|x| *x /= length);
                    }
                    beta = 1.0 / (1.0 + f64::from(-rates[i]).exp());
                }
                let mut out = vec![0.0; dv];
                for c in 0..dv {
                    let held: f64 = (0..dk).map(|r| state[r * dv + c] * decay * k[r]).sum();
                    let write = beta * (v[c] - if delta { held } else { 0.0 });
                    for r in 0..dk {
                        state[r * dv + c] = state[r * dv + c] * decay + k[r] * write;
                        out[c] += state[r * dv + c] * q[r];
                    }
                    out[c] += w.skip.as_ref().map_or(0.0, |skip| f64::from(skip[i]) * v[c]);
                }
                outs.push(out);
            }
            if delta {
                let z = &row(t)[2 * keys + values..];
                let normed = outs.iter().flat_map(|out| rms(out, &w.norm));
                all.extend(normed.zip(z).map(|(o, &z)| o * silu(z)));
            } else {
                let outs: Vec<f64> =
                    outs.concat().iter().zip(row(t)).map(|(o, &z)| o * silu(z)).collect();
                let group = values / h.groups;
                all.extend(
                    outs.chunks(group).zip(w.norm.chunks(group)).flat_map(|(o, g)| rms(o, g)),
                );
            }
        }
        all
    }
}

#[test]
fn formulas_hold() {
    for case in cases() {
        let found = &case.run(1, &[vec![(0, 0, 70)]])[0];
        for (i, (found, expected)) in found.iter().zip(case.expected(0, 70)).enumerate() {
            let off = (f64::from(*found) - expected).abs();
            assert!(off < 2e-4, "{:?} {i}: found {found}, expected {expected}", case.how);
        }
    }
}

#[test]
fn cuts_company_and_threads_do_not_change_a_bit() {
    for case in cases() {
        let whole = case.run(1, &[vec![(0, 0, 70)], vec![(1, 0, 3)], vec![(2, 0, 9)]]);
        let single: Vec<Vec<Part>> = (0..70).map(|t| vec![(0, t, 1)]).collect();
        let mixed = [
            vec![(1, 0, 1), (0, 0, 2)],
            vec![(0, 2, 37), (1, 1, 2), (2, 0, 8)],
            vec![(2, 8, 1), (0, 39, 1)],
            vec![(0, 40, 30)],
        ];
        for threads in 1..4 {
            assert!(case.run(threads, &single)[0] == whole[0], "{:?}", case.how);
            assert!(case.run(threads, &mixed) == whole, "{:?}", case.how);
        }
    }
}
