//! Bodies of the fuzz targets, shared by libFuzzer, the stable mutation driver and the test
//! that replays the corpus. They panic when an invariant breaks and do nothing otherwise.

use crate::{Bytes, Gguf, blocks, writer::GgufWriter};

/// Reads `data` as a GGUF file; where that works, touches all that it holds and writes it
/// again.
///
/// # Panics
/// When a file that reads does not come back the same after writing it.
pub fn fuzz_read(data: &[u8]) {
    let Ok(gguf) = Gguf::from_bytes(Bytes::from_vec(data.to_vec()), "fuzz") else {
        return;
    };
    touch_metadata(&gguf);

    let mut tensors = Vec::new();
    for t in gguf.tensors() {
        let bytes = gguf.data(t);
        assert_eq!(bytes.len() as u64, t.bytes);
        assert_eq!(t.ty.bytes_for(t.elements()), Some(t.bytes));
        assert_eq!(t.row_bytes() * t.rows(), t.bytes);
        assert_eq!(gguf.tensor(&t.name), Some(t));
        let some = bytes.len().min(4 * t.ty.block_bytes());
        let mut weights = vec![0.0; some / t.ty.block_bytes() * t.ty.block_len()];
        let known = blocks::can_dequantize(t.ty);
        assert_eq!(
            blocks::dequantize(t.ty, &bytes[..some], &mut weights).is_ok(),
            known
        );
        tensors.push(bytes);
    }

    let writer = GgufWriter::like(&gguf).expect("what was read can be declared");
    let written = writer
        .to_bytes(&tensors)
        .expect("what was read can be written");
    let again = Gguf::from_bytes(Bytes::from_vec(written.clone()), "again")
        .expect("what was written can be read");
    let rewritten = GgufWriter::like(&again).and_then(|w| w.to_bytes(&tensors));
    // Compared as bytes, since NaN values differ from themselves.
    assert!(
        rewritten.is_ok_and(|r| r == written),
        "writing what was written changed it"
    );
}

/// Runs every getter over every key; wrong types must be errors.
fn touch_metadata(gguf: &Gguf) {
    let m = gguf.metadata();
    for (key, value) in m.iter() {
        assert_eq!(m.get(key).map(|v| v.ty()), Some(value.ty()));
        let fits = [
            m.str(key).is_ok(),
            m.u32(key).is_ok(),
            m.u64(key).is_ok(),
            m.i32(key).is_ok(),
            m.f32(key).is_ok(),
            m.bool(key).is_ok(),
            m.array(key).is_ok(),
            m.strings(key).is_ok(),
            m.f32s(key).is_ok(),
            m.i32s(key).is_ok(),
            m.u32s(key).is_ok(),
        ];
        assert_eq!(fits[0], value.as_str().is_some());
        assert_eq!(fits[6], value.as_array().is_some());
        if let Some(array) = value.as_array() {
            assert_eq!(array.get(0).is_none(), array.is_empty());
            assert!(array.get(array.len()).is_none());
        }
    }
}
