//! `quantization_config`: how weights are stored.

use super::{ConfigError, Fields, fields::shorten};
use crate::{Family, MoeConfig, WeightQuantization};

/// Codes of MXFP4 that share an exponent.
const MXFP4_GROUP: usize = 32;

pub(super) fn parse(
    fields: Fields<'_>,
    family: Family,
    moe: Option<&MoeConfig>,
    hidden: usize,
) -> Result<WeightQuantization, ConfigError> {
    if fields.get("compression_config").is_some() {
        return Err(fields.unsupported("compression_config", "null", "an object"));
    }
    let Some(quantization) = fields.object("quantization_config")? else {
        return Ok(WeightQuantization::None);
    };
    let method = quantization
        .text("quant_method")?
        .ok_or_else(|| quantization.missing("quant_method", "fp8 or mxfp4"))?;
    match (method, family) {
        ("fp8", Family::GptOss | Family::Llama4Text | Family::GraniteMoe) => {
            Err(quantization.unsupported("quant_method", "mxfp4 or none in this family", method))
        }
        ("fp8", _) => fp8_block(quantization),
        ("mxfp4", Family::GptOss) => mxfp4(fields, moe, hidden),
        ("mxfp4", _) => Err(quantization.unsupported("quant_method", "fp8 or none in this family", method)),
        _ => Err(quantization.unsupported("quant_method", "fp8 or mxfp4", format!("{method:?}"))),
    }
}

fn fp8_block(quantization: Fields<'_>) -> Result<WeightQuantization, ConfigError> {
    match quantization.text("fmt")? {
        None | Some("e4m3") => {}
        Some(other) => return Err(quantization.unsupported("fmt", "e4m3", other)),
    }
    match quantization.text("activation_scheme")? {
        None | Some("dynamic") => {}
        Some(other) => return Err(quantization.unsupported("activation_scheme", "dynamic", other)),
    }
    let wanted = "two block lengths, as [128, 128]";
    match quantization.sizes("weight_block_size", 1..=1 << 16)? {
        Some(block) => match block[..] {
            [rows, cols] => Ok(WeightQuantization::Fp8Block { rows, cols }),
            _ => Err(quantization.invalid("weight_block_size", wanted, shorten(&block.into()))),
        },
        None => Err(quantization.missing("weight_block_size", wanted)),
    }
}

fn mxfp4(fields: Fields<'_>, moe: Option<&MoeConfig>, hidden: usize) -> Result<WeightQuantization, ConfigError> {
    let wanted = || format!("a multiple of {MXFP4_GROUP}, as mxfp4 weights share exponents");
    if !hidden.is_multiple_of(MXFP4_GROUP) {
        return Err(fields.invalid("hidden_size", wanted(), hidden));
    }
    match moe {
        Some(moe) if !moe.intermediate.is_multiple_of(MXFP4_GROUP) => {
            Err(fields.invalid("intermediate_size", wanted(), moe.intermediate))
        }
        _ => Ok(WeightQuantization::Mxfp4),
    }
}
