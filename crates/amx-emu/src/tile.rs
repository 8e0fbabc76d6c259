//! The tile registers, their configuration and the products, as a plain value.

use crate::{Op, float};

/// Tile registers of palette 1.
pub const TILES: usize = 8;
/// Rows of a full tile.
pub const MAX_ROWS: usize = 16;
/// Bytes of a full row.
pub const MAX_COLUMN_BYTES: usize = 64;

const PALETTES: u8 = 1;

/// What the processor would raise.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Fault {
    /// `#GP`: the configuration in memory is not valid.
    #[error("general protection fault: invalid tile configuration")]
    GeneralProtection,
    /// `#UD`: the instruction can't be executed with the tiles as they are configured.
    #[error("undefined opcode: tiles unconfigured, of mismatched shape, or named twice")]
    UndefinedOpcode,
}

/// The 64 bytes that `ldtilecfg` reads and `sttilecfg` writes.
///
/// Byte 0 palette, byte 1 start row, bytes 16..32 the tiles' row lengths in bytes as
/// little-endian `u16`, bytes 48..56 their row counts, everything else zero.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TileConfig(pub [u8; 64]);

impl TileConfig {
    /// Palette 0: the state after `tilerelease`.
    pub const INIT: TileConfig = TileConfig([0; 64]);

    /// Palette 1 with `(rows, bytes per row)` for each tile.
    pub fn new(shapes: [(u8, u16); TILES]) -> TileConfig {
        let mut bytes = [0; 64];
        bytes[0] = 1;
        for (i, (rows, colsb)) in shapes.into_iter().enumerate() {
            bytes[16 + 2 * i..18 + 2 * i].copy_from_slice(&colsb.to_le_bytes());
            bytes[48 + i] = rows;
        }
        TileConfig(bytes)
    }

    fn palette(&self) -> u8 {
        self.0[0]
    }

    fn rows(&self, tile: usize) -> usize {
        usize::from(self.0[48 + tile])
    }

    fn colsb(&self, tile: usize) -> usize {
        usize::from(u16::from_le_bytes([
            self.0[16 + 2 * tile],
            self.0[17 + 2 * tile],
        ]))
    }

    /// The checks of `ldtilecfg`.
    fn validate(&self) -> Result<(), Fault> {
        if self.palette() > PALETTES {
            return Err(Fault::GeneralProtection);
        }
        if self.palette() == 0 {
            return Ok(());
        }
        let reserved = [2..16, 32..48, 56..64];
        if reserved
            .into_iter()
            .any(|r| self.0[r].iter().any(|&b| b != 0))
        {
            return Err(Fault::GeneralProtection);
        }
        for tile in 0..TILES {
            let (rows, colsb) = (self.rows(tile), self.colsb(tile));
            let too_large = rows > MAX_ROWS || colsb > MAX_COLUMN_BYTES;
            if too_large || (rows == 0) != (colsb == 0) {
                return Err(Fault::GeneralProtection);
            }
        }
        Ok(())
    }
}

/// One thread's tile registers.
#[derive(Clone)]
pub struct TileState {
    config: TileConfig,
    /// `[tile][row][byte]`
    tiles: [[[u8; MAX_COLUMN_BYTES]; MAX_ROWS]; TILES],
}

impl Default for TileState {
    fn default() -> Self {
        TileState::new()
    }
}

impl TileState {
    /// The initial state: no palette, all zero.
    pub const fn new() -> TileState {
        TileState {
            config: TileConfig::INIT,
            tiles: [[[0; MAX_COLUMN_BYTES]; MAX_ROWS]; TILES],
        }
    }

    /// `ldtilecfg`: a valid configuration zeroes all tiles.
    pub fn configure(&mut self, config: TileConfig) -> Result<(), Fault> {
        config.validate()?;
        self.config = if config.palette() == 0 {
            TileConfig::INIT
        } else {
            config
        };
        self.tiles.iter_mut().for_each(clear);
        Ok(())
    }

    /// `sttilecfg`.
    pub fn config(&self) -> TileConfig {
        self.config
    }

    /// `tilerelease`.
    pub fn release(&mut self) {
        self.config = TileConfig::INIT;
        self.tiles.iter_mut().for_each(clear);
    }

    /// `(rows, bytes per row)` of a tile that is configured.
    fn shape(&self, tile: usize) -> Result<(usize, usize), Fault> {
        if tile >= TILES || self.config.palette() == 0 || self.config.rows(tile) == 0 {
            return Err(Fault::UndefinedOpcode);
        }
        Ok((self.config.rows(tile), self.config.colsb(tile)))
    }

    /// Every instruction that completes sets the restart row to zero.
    fn complete(&mut self) {
        self.config.0[1] = 0;
    }

    /// The bytes of one row of a tile, whatever its configured shape.
    pub fn row(&self, tile: usize, row: usize) -> &[u8; MAX_COLUMN_BYTES] {
        &self.tiles[tile][row]
    }

    /// `tilezero`.
    pub fn zero(&mut self, tile: usize) -> Result<(), Fault> {
        self.shape(tile)?;
        clear(&mut self.tiles[tile]);
        self.complete();
        Ok(())
    }

    /// `tileloadd`: `read(row, bytes)` fills the configured part of each row from the
    /// restart row on; the rest of the tile becomes zero.
    pub fn load(
        &mut self,
        tile: usize,
        mut read: impl FnMut(usize, &mut [u8]),
    ) -> Result<(), Fault> {
        let (rows, colsb) = self.shape(tile)?;
        for row in usize::from(self.config.0[1])..rows {
            let line = &mut self.tiles[tile][row];
            read(row, &mut line[..colsb]);
            line[colsb..].fill(0);
        }
        for line in &mut self.tiles[tile][rows..] {
            line.fill(0);
        }
        self.complete();
        Ok(())
    }

    /// `tilestored`: `write(row, bytes)` receives the configured part of each row from the
    /// restart row on.
    pub fn store(&mut self, tile: usize, mut write: impl FnMut(usize, &[u8])) -> Result<(), Fault> {
        let (rows, colsb) = self.shape(tile)?;
        for row in usize::from(self.config.0[1])..rows {
            write(row, &self.tiles[tile][row][..colsb]);
        }
        self.complete();
        Ok(())
    }

    /// The products: `dest[m][n] += Σ_k a[m][k] · b[k][n]`, groups of four bytes or pairs of
    /// 16-bit floats folded into each k. `op` must be one of the six `tdp…`.
    pub fn dot(&mut self, op: Op, dest: usize, a: usize, b: usize) -> Result<(), Fault> {
        let (rows, dest_colsb) = self.shape(dest)?;
        let (a_rows, a_colsb) = self.shape(a)?;
        let (b_rows, b_colsb) = self.shape(b)?;
        let distinct = dest != a && dest != b && a != b;
        let whole_dwords = (dest_colsb | a_colsb | b_colsb) % 4 == 0;
        let fits = rows == a_rows && a_colsb / 4 == b_rows && dest_colsb == b_colsb;
        if !distinct || !whole_dwords || !fits {
            return Err(Fault::UndefinedOpcode);
        }
        let signed = |x: u8| i32::from(x as i8);
        let unsigned = i32::from;
        match op {
            Op::TdpBssd => self.dot_bytes(dest, a, b, signed, signed),
            Op::TdpBsud => self.dot_bytes(dest, a, b, signed, unsigned),
            Op::TdpBusd => self.dot_bytes(dest, a, b, unsigned, signed),
            Op::TdpBuud => self.dot_bytes(dest, a, b, unsigned, unsigned),
            Op::TdpBf16Ps => self.dot_halves(dest, a, b, float::from_bf16),
            Op::TdpFp16Ps => self.dot_halves(dest, a, b, float::from_fp16),
            _ => return Err(Fault::UndefinedOpcode),
        }
        for line in &mut self.tiles[dest][..rows] {
            line[dest_colsb..].fill(0);
        }
        for line in &mut self.tiles[dest][rows..] {
            line.fill(0);
        }
        self.complete();
        Ok(())
    }

    fn dot_bytes(
        &mut self,
        dest: usize,
        a: usize,
        b: usize,
        widen_a: impl Fn(u8) -> i32,
        widen_b: impl Fn(u8) -> i32,
    ) {
        let depth = self.config.colsb(a) / 4;
        for m in 0..self.config.rows(dest) {
            for n in 0..self.config.colsb(dest) / 4 {
                let at = 4 * n..4 * n + 4;
                let mut sum = i32::from_le_bytes(word(&self.tiles[dest][m][at.clone()]));
                for k in 0..depth {
                    let x: [u8; 4] = word(&self.tiles[a][m][4 * k..4 * k + 4]);
                    let y: [u8; 4] = word(&self.tiles[b][k][at.clone()]);
                    for (&x, &y) in x.iter().zip(&y) {
                        sum = sum.wrapping_add(widen_a(x) * widen_b(y));
                    }
                }
                self.tiles[dest][m][at].copy_from_slice(&sum.to_le_bytes());
            }
        }
    }

    /// Even and odd elements accumulate apart, starting from zero, and meet the destination
    /// at the end: that is the documented order, and it shows in the last bits.
    fn dot_halves(&mut self, dest: usize, a: usize, b: usize, widen: impl Fn(u16) -> f32) {
        let depth = self.config.colsb(a) / 4;
        let pair = |line: &[u8], k: usize| {
            let at = |i: usize| u16::from_le_bytes([line[4 * k + i], line[4 * k + i + 1]]);
            (widen(at(0)), widen(at(2)))
        };
        for m in 0..self.config.rows(dest) {
            for n in 0..self.config.colsb(dest) / 4 {
                let (mut even, mut odd) = (0f32, 0f32);
                for k in 0..depth {
                    let x = pair(&self.tiles[a][m], k);
                    let y = pair(&self.tiles[b][k], n);
                    even = float::fma(x.0, y.0, even);
                    odd = float::fma(x.1, y.1, odd);
                }
                let at = 4 * n..4 * n + 4;
                let old = f32::from_le_bytes(word(&self.tiles[dest][m][at.clone()]));
                let new = float::add(old, float::add(even, odd));
                self.tiles[dest][m][at].copy_from_slice(&new.to_le_bytes());
            }
        }
    }
}

/// Zeroes in place: a signal handler's stack has no room for a temporary register file.
fn clear(tile: &mut [[u8; MAX_COLUMN_BYTES]; MAX_ROWS]) {
    tile.as_flattened_mut().fill(0);
}

fn word(bytes: &[u8]) -> [u8; 4] {
    [bytes[0], bytes[1], bytes[2], bytes[3]]
}
