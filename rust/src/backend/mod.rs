//! What a forward pass may ask of a machine. Activations are `[tokens, width]` f32, row-major.
