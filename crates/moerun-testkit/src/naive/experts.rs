//! Feed-forwards: dense, shared, and the mixture of experts.

use super::{
    Rows,
    config::Config,
    gate::Choice,
    maths::{dot, erf, linear, sigmoid},
    weights::{Matrix, Weights},
};
use crate::{Family, TestkitError};

/// `down(act(gate x) ⊙ up x)`, whatever the layout of its tensors was.
struct FeedForward<'a> {
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    gate_bias: Option<Vec<f64>>,
    up_bias: Option<Vec<f64>>,
    down_bias: Option<&'a [f64]>,
}

impl FeedForward<'_> {
    fn forward(&self, config: &Config, x: &[f64]) -> Result<Vec<f64>, TestkitError> {
        let gate = linear(&self.gate, self.gate_bias.as_deref(), x);
        let up = linear(&self.up, self.up_bias.as_deref(), x);
        let gated = gate
            .iter()
            .zip(&up)
            .map(|(&gate, &up)| glu(config, gate, up))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(linear(&self.down, self.down_bias, &gated))
    }
}

/// One element of the gated activation.
fn glu(config: &Config, gate: f64, up: f64) -> Result<f64, TestkitError> {
    if config.family == Family::GptOss {
        let limit = config.float_or("swiglu_limit", 7.0)?;
        let alpha = config.float_or("swiglu_alpha", 1.702)?;
        let gate = gate.min(limit);
        return Ok((up.clamp(-limit, limit) + 1.0) * gate * sigmoid(alpha * gate));
    }
    let activated = match config.text_or("hidden_act", "silu") {
        "silu" | "swish" => gate * sigmoid(gate),
        "relu" => gate.max(0.0),
        "gelu" => 0.5 * gate * (1.0 + erf(gate / 2f64.sqrt())),
        "gelu_pytorch_tanh" | "gelu_new" => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (gate + 0.044715 * gate.powi(3));
            0.5 * gate * (1.0 + inner.tanh())
        }
        other => {
            return Err(TestkitError::Unknown {
                what: "hidden_act",
                name: other.to_owned(),
            });
        }
    };
    Ok(activated * up)
}

/// The feed-forward of a layer without experts.
pub(crate) fn dense(config: &Config, weights: &Weights, layer: usize, input: &Rows) -> Result<Rows, TestkitError> {
    let prefix = config.feed_forward_prefix(layer);
    let network = plain(config, weights, &prefix, config.dense_intermediate()?)?;
    input.iter().map(|row| network.forward(config, row)).collect()
}

/// Weighted sum of each token's experts, plus the shared experts.
pub(crate) fn mixture(
    config: &Config,
    weights: &Weights,
    layer: usize,
    input: &Rows,
    choices: &[Choice],
) -> Result<Rows, TestkitError> {
    let mut output = vec![vec![0.0; config.size("hidden_size")?]; input.len()];
    for expert in 0..config.num_experts()? {
        let mut network = None; // read once, and only if some token takes it
        for (token, choice) in choices.iter().enumerate() {
            let Some(place) = choice.ids.iter().position(|&id| id == expert) else {
                continue;
            };
            let network = match &network {
                Some(network) => network,
                None => network.insert(routed(config, weights, layer, expert)?),
            };
            let weight = choice.weights[place];
            let (on_input, on_output) = if config.family == Family::Llama4Text {
                (weight, 1.0)
            } else {
                (1.0, weight)
            };
            let scaled: Vec<f64> = input[token].iter().map(|value| value * on_input).collect();
            add(&mut output[token], &network.forward(config, &scaled)?, on_output);
        }
    }
    add_shared(config, weights, layer, input, &mut output)?;
    Ok(output)
}

fn add(row: &mut [f64], other: &[f64], factor: f64) {
    row.iter_mut()
        .zip(other)
        .for_each(|(value, other)| *value += factor * other);
}

/// Adds the experts that every token takes, where the family has them.
fn add_shared(
    config: &Config,
    weights: &Weights,
    layer: usize,
    input: &Rows,
    output: &mut Rows,
) -> Result<(), TestkitError> {
    let prefix = config.feed_forward_prefix(layer);
    let width = config.expert_intermediate()?;
    let (name, width) = match config.family {
        Family::Qwen2Moe => ("shared_expert", config.size("shared_expert_intermediate_size")?),
        Family::Llama4Text => ("shared_expert", width),
        Family::DeepseekV2 | Family::DeepseekV3 | Family::Glm4Moe => {
            ("shared_experts", width * config.size_or("n_shared_experts", 0)?)
        }
        Family::Ernie45Moe => ("shared_experts", width * config.size_or("moe_num_shared_experts", 0)?),
        _ => return Ok(()),
    };
    if width == 0 {
        return Ok(());
    }
    let network = plain(config, weights, &format!("{prefix}.{name}"), width)?;
    for (row, out) in input.iter().zip(output) {
        let factor = match config.family {
            Family::Qwen2Moe => {
                let gate = format!("{prefix}.shared_expert_gate.weight");
                sigmoid(dot(weights.row(&gate, 0, 1, row.len())?, row))
            }
            _ => 1.0,
        };
        add(out, &network.forward(config, row)?, factor);
    }
    Ok(())
}

/// `gate_proj`, `up_proj`, `down_proj` under a prefix, with biases where the family's config asks for them.
fn plain<'a>(
    config: &Config,
    weights: &'a Weights,
    prefix: &str,
    width: usize,
) -> Result<FeedForward<'a>, TestkitError> {
    let hidden = config.size("hidden_size")?;
    let biased = match config.family {
        Family::Llama => config.flag_or("mlp_bias", false)?,
        Family::Ernie45Moe => config.flag_or("use_bias", false)?,
        _ => false,
    };
    let bias = |name: &str, len: usize| match biased {
        true => weights.vector(&format!("{prefix}.{name}.bias"), len).map(Some),
        false => Ok(None),
    };
    Ok(FeedForward {
        gate: weights.matrix(&format!("{prefix}.gate_proj.weight"), width, hidden)?,
        up: weights.matrix(&format!("{prefix}.up_proj.weight"), width, hidden)?,
        down: weights.matrix(&format!("{prefix}.down_proj.weight"), hidden, width)?,
        gate_bias: bias("gate_proj", width)?.map(<[f64]>::to_vec),
        up_bias: bias("up_proj", width)?.map(<[f64]>::to_vec),
        down_bias: bias("down_proj", hidden)?,
    })
}

/// One routed expert, in the layout its family stores it in.
fn routed<'a>(
    config: &Config,
    weights: &'a Weights,
    layer: usize,
    expert: usize,
) -> Result<FeedForward<'a>, TestkitError> {
    let hidden = config.size("hidden_size")?;
    let width = config.expert_intermediate()?;
    let experts = config.num_experts()?;
    let prefix = config.feed_forward_prefix(layer);
    match config.family {
        Family::Mixtral | Family::PhiMoe => {
            let name = |matrix: &str| format!("{prefix}.experts.{expert}.{matrix}.weight");
            Ok(FeedForward {
                gate: weights.matrix(&name("w1"), width, hidden)?,
                up: weights.matrix(&name("w3"), width, hidden)?,
                down: weights.matrix(&name("w2"), hidden, width)?,
                gate_bias: None,
                up_bias: None,
                down_bias: None,
            })
        }
        Family::GraniteMoe => {
            let name = format!("{prefix}.input_linear.weight");
            let gate_up = weights.matrix_of_stack(&name, expert, [experts, 2 * width, hidden])?;
            let name = format!("{prefix}.output_linear.weight");
            Ok(FeedForward {
                gate: gate_up.select_rows(|row| row < width),
                up: gate_up.select_rows(|row| row >= width),
                down: weights.matrix_of_stack(&name, expert, [experts, hidden, width])?,
                gate_bias: None,
                up_bias: None,
                down_bias: None,
            })
        }
        Family::GptOss | Family::Llama4Text => {
            let name = format!("{prefix}.experts.gate_up_proj");
            let gate_up = weights
                .matrix_of_stack(&name, expert, [experts, hidden, 2 * width])?
                .transposed();
            let name = format!("{prefix}.experts.down_proj");
            let down = weights
                .matrix_of_stack(&name, expert, [experts, width, hidden])?
                .transposed();
            if config.family == Family::Llama4Text {
                return Ok(FeedForward {
                    gate: gate_up.select_rows(|row| row < width),
                    up: gate_up.select_rows(|row| row >= width),
                    down,
                    gate_bias: None,
                    up_bias: None,
                    down_bias: None,
                });
            }
            let name = format!("{prefix}.experts.gate_up_proj_bias");
            let bias = weights.row(&name, expert, experts, 2 * width)?;
            let name = format!("{prefix}.experts.down_proj_bias");
            Ok(FeedForward {
                gate: gate_up.select_rows(|row| row.is_multiple_of(2)),
                up: gate_up.select_rows(|row| !row.is_multiple_of(2)),
                down,
                gate_bias: Some(bias.iter().copied().step_by(2).collect()),
                up_bias: Some(bias.iter().copied().skip(1).step_by(2).collect()),
                down_bias: Some(weights.row(&name, expert, experts, hidden)?),
            })
        }
        _ => plain(config, weights, &format!("{prefix}.experts.{expert}"), width),
    }
}
