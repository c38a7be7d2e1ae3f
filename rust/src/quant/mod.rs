//! The canonical quantized forms.
