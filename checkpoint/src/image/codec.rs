//! The one place that turns images and messages into bytes: bincode 2, fixed-width integers,
//! little-endian, with a limit. A decoder must consume its input whole, so that a frame cannot
//! carry anything unread.

use serde::{Serialize, de::DeserializeOwned};

/// Largest encoded message, bytes: bounds what a lying length can make us allocate.
pub const LIMIT: usize = 64 << 20;

/// Why bytes could not be made or read.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// The value does not fit or cannot be encoded.
    #[error("cannot encode: {0}")]
    Encode(#[from] bincode::error::EncodeError),
    /// The bytes are truncated, hostile or of another version.
    #[error("cannot decode: {0}")]
    Decode(#[from] bincode::error::DecodeError),
    /// Bytes were left over.
    #[error("{0} bytes left over after the message")]
    Trailing(usize),
    /// Longer than [`LIMIT`].
    #[error("message of {0} bytes is over the limit of {LIMIT}")]
    TooLong(usize),
}

fn config() -> impl bincode::config::Config {
    bincode::config::standard().with_fixed_int_encoding().with_little_endian().with_limit::<LIMIT>()
}

/// Encodes one message.
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, CodecError> {
    let bytes = bincode::serde::encode_to_vec(value, config())?;
    if bytes.len() > LIMIT {
        return Err(CodecError::TooLong(bytes.len()));
    }
    Ok(bytes)
}

/// Decodes one message that must fill `bytes` exactly.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    let (value, used) = bincode::serde::decode_from_slice(bytes, config())?;
    if used != bytes.len() {
        return Err(CodecError::Trailing(bytes.len() - used));
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        let bytes = encode(&(1u32, "ab".to_string(), Some(7i64))).expect("encodes");
        assert_eq!(bytes, [1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, b'a', b'b', 1, 7, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn refuses_what_is_left_over_or_cut() {
        let mut bytes = encode(&(1u32, 2u32)).expect("encodes");
        assert!(decode::<(u32, u32)>(&bytes[..7]).is_err());
        bytes.push(0);
        assert!(matches!(decode::<(u32, u32)>(&bytes), Err(CodecError::Trailing(1))));
        // A vector that claims 2^60 elements must be an error, not an allocation.
        let hostile = (1u64 << 60).to_le_bytes();
        assert!(decode::<Vec<u8>>(&hostile).is_err());
    }
}
