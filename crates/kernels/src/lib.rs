//! Every CPU instruction-set line of Tegula. See `docs/ARCHITECTURE.md`.
