//! How text is cut before its pieces are merged, by the names that llama.cpp gives.

use serde_json::{Value, json};

/// How text is cut before merging, and what goes with it.
pub(super) struct PreTokenizer {
    pub(super) names: &'static [&'static str],
    pub(super) steps: fn() -> Value,
    pub(super) ignore_merges: bool,
    pub(super) adds_bos: bool,
}

/// The patterns are those of the models' own files, which `llama-vocab.cpp` quotes.
pub(super) const PRE_TOKENIZERS: [PreTokenizer; 9] = [
    PreTokenizer {
        names: &["gpt-2", "olmo", "mpt"],
        steps: || json!([byte_level_step(true)]),
        ignore_merges: false,
        adds_bos: false,
    },
    PreTokenizer {
        names: &["refact", "starcoder", "smollm"],
        steps: || json!([{ "type": "Digits", "individual_digits": true }, byte_level_step(true)]),
        ignore_merges: false,
        adds_bos: false,
    },
    PreTokenizer {
        names: &["llama-bpe", "llama3", "llama-v3"],
        steps: || json!([split_step(r"\p{N}{1,3}"), byte_level_step(false)]),
        ignore_merges: true,
        adds_bos: true,
    },
    PreTokenizer {
        names: &["qwen2"],
        steps: || json!([split_step(r"\p{N}"), byte_level_step(false)]),
        ignore_merges: false,
        adds_bos: false,
    },
    PreTokenizer {
        names: &["gpt-4o"],
        steps: || json!([split(GPT_4O), byte_level_step(false)]),
        ignore_merges: false,
        adds_bos: false,
    },
    PreTokenizer {
        names: &["deepseek-llm"],
        steps: || steps(&DEEPSEEK_LLM),
        ignore_merges: false,
        adds_bos: false,
    },
    PreTokenizer {
        names: &["deepseek-v3"],
        steps: || steps(&DEEPSEEK_V3),
        ignore_merges: false,
        adds_bos: false,
    },
    PreTokenizer {
        names: &["glm4"],
        steps: || json!([split_step(r"\p{N}{1,3}"), byte_level_step(false)]),
        ignore_merges: true,
        adds_bos: false,
    },
    PreTokenizer {
        names: &["chatglm-bpe"],
        steps: || json!([split_step(r"\p{N}{1,3}"), byte_level_step(false)]),
        ignore_merges: false,
        adds_bos: false,
    },
];

/// Words with at most one change from capitals to small letters, and a contraction after them.
const GPT_4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Each pattern cuts what those before it left.
const DEEPSEEK_LLM: [&str; 6] = [
    r"[\r\n]",
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    r"[一-龥ࠀ-一가-퟿]+",
    r"\p{N}+",
];

const DEEPSEEK_V3: [&str; 3] = [
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
];

/// Cuts by each pattern in turn, then writes bytes as letters.
fn steps(patterns: &[&str]) -> Value {
    let cuts = patterns.iter().map(|pattern| split(pattern));
    cuts.chain([byte_level_step(false)]).collect()
}

pub(super) fn byte_level_step(use_regex: bool) -> Value {
    json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex })
}

/// Contractions, words with one sign before them, numbers, signs, line ends, spaces.
fn split_step(numbers: &str) -> Value {
    let pattern = format!(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    );
    split(&pattern)
}

fn split(pattern: &str) -> Value {
    json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false })
}
