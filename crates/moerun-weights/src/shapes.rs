//! Configs of released models, by name: what `synthesize` can make without a download.

/// A released model's shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Short name.
    pub name: &'static str,
    /// Its `config.json`, in the spelling it has on the Hub, without what says how the original is quantised.
    pub config_json: &'static str,
}

/// All shapes, smallest first.
pub const SHAPES: &[Shape] = &[
    Shape {
        name: "granite-3.1-1b-a400m",
        config_json: include_str!("shapes/granite-3.1-1b-a400m.json"),
    },
    Shape {
        name: "olmoe-1b-7b",
        config_json: include_str!("shapes/olmoe-1b-7b.json"),
    },
    Shape {
        name: "qwen1.5-moe-a2.7b",
        config_json: include_str!("shapes/qwen1.5-moe-a2.7b.json"),
    },
    Shape {
        name: "deepseek-v2-lite",
        config_json: include_str!("shapes/deepseek-v2-lite.json"),
    },
    Shape {
        name: "gpt-oss-20b",
        config_json: include_str!("shapes/gpt-oss-20b.json"),
    },
    Shape {
        name: "qwen3-30b-a3b",
        config_json: include_str!("shapes/qwen3-30b-a3b.json"),
    },
    Shape {
        name: "mixtral-8x7b",
        config_json: include_str!("shapes/mixtral-8x7b.json"),
    },
];

impl Shape {
    /// The shape called `name`.
    pub fn by_name(name: &str) -> Option<&'static Shape> {
        SHAPES.iter().find(|shape| shape.name == name)
    }
}
