//! The model's own chat template: a conversation in, the text that the model was trained on out.
//!
//! Templates are Jinja as transformers runs it (`apply_chat_template`): blocks trimmed, loop controls, Python's string
//! methods, `raise_exception`, `strftime_now`, `tojson` without HTML escapes.

use std::collections::BTreeMap;

use minijinja::{Environment, Error, ErrorKind, Value, context, syntax::SyntaxConfig};
use minijinja_contrib::pycompat;

use super::{clock::strftime_now, json_filter::tojson};
use crate::GatewayError;

/// A template is data from a checkpoint: it may take about this many instructions, or 64 times as many bytes.
const FUEL: u64 = 2_000_000;

const NAME: &str = "chat_template";

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant` or whatever the model's template knows.
    pub role: String,
    /// What was said.
    pub content: String,
}

/// A compiled template.
#[derive(Debug)]
pub(super) struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: Vec<(&'static str, String)>,
}

impl ChatTemplate {
    /// Compiles `source`; the error says, in words, where it does not compile.
    pub(super) fn compile(source: &str, special_tokens: Vec<(&'static str, String)>) -> Result<Self, String> {
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        let mut environment = Environment::new();
        environment.set_syntax(syntax.map_err(|error| describe(&error))?);
        environment.set_debug(false); // error messages must not quote what people said
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", |format: &str| strftime_now(format));
        environment.add_filter("tojson", tojson);
        environment
            .add_template_owned(NAME, without_generation_tags(source))
            .map_err(|error| describe(&error))?;
        Ok(ChatTemplate {
            environment,
            special_tokens,
        })
    }

    /// Renders a conversation with the assistant's turn opened.
    pub(super) fn render(&self, messages: &[ChatMessage]) -> Result<String, GatewayError> {
        let messages: Value = messages
            .iter()
            .map(|message| context! { role => &*message.role, content => &*message.content })
            .collect();
        let variables = [
            ("messages", messages),
            ("add_generation_prompt", Value::from(true)),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ];
        let special_tokens = self
            .special_tokens
            .iter()
            .map(|(name, token)| (*name, Value::from(&**token)));
        let context: BTreeMap<&str, Value> = variables.into_iter().chain(special_tokens).collect();
        self.environment
            .get_template(NAME)
            .and_then(|template| template.render(context))
            .map_err(|error| GatewayError::ChatTemplate {
                reason: describe(&error),
            })
    }
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

fn describe(error: &Error) -> String {
    let what = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.line() {
        Some(line) => format!("{what} (line {line})"),
        None => what,
    }
}

/// `{% generation %}` marks the assistant's tokens for training and prints its body unchanged: the tag is replaced by
/// one that does the same here.
fn without_generation_tags(source: &str) -> String {
    let mut output = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else { break };
        let inner = &rest[start + 2..start + length];
        let word = inner.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let replacement = match word {
            "generation" => "if true",
            "endgeneration" => "endif",
            other => other,
        };
        output.push_str(&rest[..start + 2]);
        if replacement == word {
            output.push_str(inner);
        } else {
            output.push_str(&inner.replacen(word, replacement, 1));
        }
        output.push_str("%}");
        rest = &rest[start + length + 2..];
    }
    output.push_str(rest);
    output
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(role: &str, content: &str) -> ChatMessage {
        ChatMessage {
            role: role.to_owned(),
            content: content.to_owned(),
        }
    }

    fn render(source: &str, messages: &[ChatMessage]) -> Result<String, GatewayError> {
        let tokens = vec![("bos_token", "<s>".to_owned()), ("eos_token", "</s>".to_owned())];
        ChatTemplate::compile(source, tokens).unwrap().render(messages)
    }

    #[test]
    fn blocks_are_trimmed_and_special_tokens_known() {
        let source = "{{ bos_token }}{% for m in messages %}\n    {% if m.role == 'user' %}\n[{{ m['content'] }}]\n    \
                      {% endif %}\n{% endfor %}\n{{ eos_token }}\n";
        // As Jinja2 with trim_blocks and lstrip_blocks prints it.
        assert_eq!(
            render(source, &[message("user", "a"), message("system", "b")]).unwrap(),
            "<s>[a]\n</s>"
        );
    }

    #[test]
    fn python_methods_and_loop_controls_work() {
        let source = "{% for m in messages %}{% if m.role.startswith('s') %}{% continue %}{% endif %}\
                      {{ m.content.split('</think>')[-1].strip() }}|{% endfor %}\
                      {% if tools is none and not documents and undefined_thing is not defined %}ok{% endif %}";
        let messages = [
            message("system", "x"),
            message("user", "a</think> b "),
            message("user", "c"),
        ];
        assert_eq!(render(source, &messages).unwrap(), "b|c|ok");
    }

    #[test]
    fn the_templates_own_refusal_is_reported() {
        let source = "{{ raise_exception('roles must alternate') }}";
        let error = render(source, &[]).unwrap_err();
        assert!(
            matches!(&error, GatewayError::ChatTemplate { reason } if reason.contains("roles must alternate")),
            "{error}"
        );
    }

    #[test]
    fn json_is_pythons() {
        let source =
            "{{ messages | tojson }} {{ [1, 'é<'] | tojson(ensure_ascii=true) }} {{ {'a': []} | tojson(indent=2) }}";
        assert_eq!(
            render(source, &[message("user", "<\"é'>\n&")]).unwrap(),
            "[{\"role\": \"user\", \"content\": \"<\\\"é'>\\n&\"}] [1, \"\\u00e9<\"] {\n  \"a\": []\n}"
        );
    }

    #[test]
    fn an_endless_template_runs_out_of_fuel() {
        let source = "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}";
        assert!(matches!(render(source, &[]), Err(GatewayError::ChatTemplate { .. })));
        assert!(matches!(
            render("{{ 'x' * 1000000000 }}", &[]),
            Err(GatewayError::ChatTemplate { .. })
        ));
    }

    #[test]
    fn generation_tags_print_their_body() {
        let source = "{% for m in messages %}{%- generation -%} {{ m.content }} {%- endgeneration %}{% endfor %}";
        assert_eq!(render(source, &[message("assistant", "a")]).unwrap(), "a");
    }

    #[test]
    fn a_template_that_does_not_compile_is_an_error_with_its_line() {
        let error = ChatTemplate::compile("a\n{% for %}", Vec::new()).unwrap_err();
        assert!(error.contains("line 2"), "{error}");
    }

    #[test]
    fn dates_are_available() {
        let year: u32 = render("{{ strftime_now('%Y') }}", &[]).unwrap().parse().unwrap();
        assert!(year >= 2024);
    }
}
