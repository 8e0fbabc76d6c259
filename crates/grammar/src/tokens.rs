//! Our vocabulary as llguidance's prefix tree.

use std::sync::Arc;

use crate::GrammarError;
use tegula_gguf::{
    Tokenizer,
    tokenizer::{EncodeOptions, TokenKind},
};
use toktrie::{TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};

struct Environment {
    trie: TokTrie,
    tokenizer: Tokenizer,
}

impl TokenizerEnv for Environment {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        match std::str::from_utf8(bytes) {
            Ok(text) => self.tokenizer.encode(
                text,
                EncodeOptions {
                    add_special: false,
                    parse_special: false,
                },
            ),
            Err(_) => self.trie.greedy_tokenize(bytes),
        }
    }

    /// A text's tokens are what the model would choose for the whole of it, not for the part
    /// that the grammar forces.
    fn tokenize_is_canonical(&self) -> bool {
        false
    }
}

/// The bytes of every token. Control tokens get llguidance's mark, so that no text matches
/// them; tokens that are never generated get none.
pub(crate) fn environment(tokenizer: &Tokenizer) -> Result<TokEnv, GrammarError> {
    let eog = tokenizer.eog();
    let Some(&eos) = eog.first() else {
        let why = "it has no end-of-generation token".to_owned();
        return Err(GrammarError::Vocabulary(why));
    };
    let size = tokenizer.vocab_size() as u32;
    let words: Vec<Vec<u8>> = (0..size)
        .map(|id| match tokenizer.token_kind(id) {
            None | Some(TokenKind::Unused) => Vec::new(),
            Some(TokenKind::Control | TokenKind::Unknown) => {
                let mut word = vec![TokTrie::SPECIAL_TOKEN_MARKER];
                word.extend(tokenizer.piece(id));
                word
            }
            Some(TokenKind::Normal | TokenKind::UserDefined | TokenKind::Byte) => {
                tokenizer.piece(id)
            }
        })
        .collect();
    let mut info = TokRxInfo::new(size, eos);
    info.tok_bos = tokenizer.bos();
    info.tok_pad = tokenizer.pad();
    info.tok_unk = tokenizer.unknown();
    info.tok_end_of_turn = tokenizer.eot();
    let trie = TokTrie::from(&info, &words).with_eos_tokens(eog);
    Ok(Arc::new(Environment {
        trie,
        tokenizer: tokenizer.clone(),
    }))
}
