//! The text of `--shard` and `--experts`.

use super::{ShardError, ShardItem, ShardSpec};

/// What a worker is told that is to hold nothing yet.
pub(super) const NOTHING: &str = "none";

pub(super) const INDEX_BELOW_COUNT: &str = "wanted I/N with I from 0 and below N";

impl ShardSpec {
    /// Parses `I/N` or `slice:I/N`, or several of them with commas between.
    pub fn parse_shard(text: &str) -> Result<Self, ShardError> {
        match text
            .split(',')
            .map(Self::parse_one_shard)
            .collect::<Result<Vec<_>, _>>()
        {
            Ok(mut one) if one.len() == 1 => Ok(one.remove(0)),
            Ok(several) => Ok(ShardSpec::Union(several)),
            Err(error) => Err(error),
        }
    }

    fn parse_one_shard(text: &str) -> Result<Self, ShardError> {
        let error = |reason: &str| ShardError::Syntax {
            text: text.to_owned(),
            reason: reason.to_owned(),
        };
        let (sliced, fraction) = match text.strip_prefix("slice:") {
            Some(fraction) => (true, fraction),
            None => (false, text),
        };
        let (index, count) = fraction
            .split_once('/')
            .ok_or_else(|| error("wanted I/N or slice:I/N"))?;
        let (index, count) = (
            number(index).map_err(|why| error(&why))?,
            number(count).map_err(|why| error(&why))?,
        );
        if index >= count {
            return Err(error(INDEX_BELOW_COUNT));
        }
        Ok(if sliced {
            ShardSpec::Slices { index, count }
        } else {
            ShardSpec::Experts { index, count }
        })
    }

    /// Parses `L:E[:S]` items, as in `0-15:0-31,16-23:*`; the word `none` names nothing.
    pub fn parse_experts(text: &str) -> Result<Self, ShardError> {
        if text == NOTHING {
            return Ok(ShardSpec::List(Vec::new()));
        }
        let error = |reason: String| ShardError::Syntax {
            text: text.to_owned(),
            reason,
        };
        text.split(',')
            .map(parse_item)
            .collect::<Result<_, _>>()
            .map(ShardSpec::List)
            .map_err(error)
    }
}

fn parse_item(text: &str) -> Result<ShardItem, String> {
    let within_item = |why: String| format!("in {text:?}: {why}");
    let mut parts = text.split(':');
    match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some(layers), Some(experts), blocks, None) => Ok(ShardItem {
            layers: range(layers).map_err(within_item)?,
            experts: range(experts).map_err(within_item)?,
            blocks: blocks.map_or(Ok(None), range).map_err(within_item)?,
        }),
        _ => Err(format!("wanted items LAYERS:EXPERTS[:BLOCKS], found {text:?}")),
    }
}

/// `a`, `a-b` or `*` (`None`).
fn range(text: &str) -> Result<Option<(usize, usize)>, String> {
    if text == "*" {
        return Ok(None);
    }
    let (first, last) = match text.split_once('-') {
        Some((first, last)) => (number(first)?, number(last)?),
        None => (number(text)?, number(text)?),
    };
    if first > last {
        return Err(format!("range {text:?} runs backwards"));
    }
    Ok(Some((first, last)))
}

fn number(text: &str) -> Result<usize, String> {
    // Unlike `usize::from_str`, no sign.
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits {
        return Err(format!("wanted a number, found {text:?}"));
    }
    text.parse().map_err(|_| format!("number {text} is too large"))
}
