//! Fake dead kernels, whole and with one thing damaged.
