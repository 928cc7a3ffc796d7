//! Settings from the environment: `MOERUN_MAX_CONTEXT` for `max_context`.

use figment::value::{Dict, Value};

use super::SettingsError;

/// What a variable holds.
#[derive(Clone, Copy)]
enum Form {
    /// Its text as it is, were it a number.
    Text,
    /// A number without sign.
    Number,
    /// Texts with commas between.
    List,
    /// `true` or `false`.
    Truth,
}

/// Settings that the environment may give; other `MOERUN_` variables (`MOERUN_ISA`, …) are no settings. Of two for one
/// setting the later wins.
const VARIABLES: &[(&str, &str, Form)] = &[
    ("MOERUN_MODEL", "model", Form::Text),
    ("MOERUN_WEIGHTS", "weights", Form::Text),
    ("MOERUN_COMBINE", "combine", Form::Text),
    ("MOERUN_COMBINE_BLOCK", "combine_block", Form::Number),
    ("MOERUN_THREADS", "threads", Form::Number),
    ("MOERUN_KV_MEMORY", "kv_memory", Form::Text),
    ("MOERUN_KV_FORMAT", "kv_format", Form::Text),
    ("MOERUN_MAX_CONTEXT", "max_context", Form::Number),
    ("MOERUN_MAX_BATCH_TOKENS", "max_batch_tokens", Form::Number),
    ("MOERUN_MAX_QUEUE", "max_queue", Form::Number),
    ("MOERUN_PREFIX_CACHE", "prefix_cache", Form::Text),
    ("MOERUN_SPECULATE", "speculate", Form::Number),
    ("MOERUN_SPIN", "spin", Form::Text),
    ("MOERUN_ON_EXPERT_LOSS", "on_expert_loss", Form::Text),
    ("MOERUN_CANARY_INTERVAL", "canary_interval", Form::Number),
    ("MOERUN_SERVED_NAME", "served_name", Form::Text),
    ("MOERUN_LOG_FORMAT", "log_format", Form::Text),
    ("MOERUN_LOG", "log_level", Form::Text),
    ("MOERUN_LOG_LEVEL", "log_level", Form::Text),
    ("MOERUN_GRPC_ADDR", "grpc_addr", Form::Text),
    ("MOERUN_HEALTH_ADDR", "health_addr", Form::Text),
    ("MOERUN_METRICS_ADDR", "metrics_addr", Form::Text),
    ("MOERUN_ADMIN_ADDR", "admin_addr", Form::Text),
    ("MOERUN_WORKERS", "workers", Form::Number),
    ("MOERUN_WORKER", "worker", Form::List),
    ("MOERUN_DISCOVER", "discover", Form::List),
    ("MOERUN_DISCOVER_INTERVAL", "discover_interval", Form::Number),
    ("MOERUN_DNS_SERVER", "dns_server", Form::Text),
    ("MOERUN_REGISTRY_ADDR", "registry_addr", Form::Text),
    ("MOERUN_REGISTER", "register", Form::List),
    ("MOERUN_ADVERTISE", "advertise", Form::Text),
    ("MOERUN_LISTEN", "listen", Form::Text),
    ("MOERUN_SHARD", "shard", Form::Text),
    ("MOERUN_REPLICAS", "replicas", Form::Number),
    ("MOERUN_EXPERTS", "experts", Form::Text),
    ("MOERUN_EXPERT_MEMORY", "expert_memory", Form::Text),
    ("MOERUN_PLACEMENT", "placement", Form::Text),
    ("MOERUN_PLACEMENT_REPLICAS", "placement_replicas", Form::Number),
    ("MOERUN_INSECURE", "insecure", Form::Truth),
    ("MOERUN_TLS_CERT", "tls_cert", Form::Text),
    ("MOERUN_TLS_KEY", "tls_key", Form::Text),
    ("MOERUN_TLS_CA", "tls_ca", Form::Text),
    ("MOERUN_ALLOW_PEER", "allow_peer", Form::List),
    ("MOERUN_GRPC_TLS_CERT", "grpc_tls_cert", Form::Text),
    ("MOERUN_GRPC_TLS_KEY", "grpc_tls_key", Form::Text),
    ("MOERUN_GRPC_TLS_CLIENT_CA", "grpc_tls_client_ca", Form::Text),
    ("MOERUN_API_KEYS", "api_keys", Form::Text),
    ("MOERUN_API_KEY_LIST", "api_key_list", Form::Text),
    ("MOERUN_MAX_CONNECTIONS", "max_connections", Form::Number),
    ("MOERUN_MAX_ANSWER_TOKENS", "max_answer_tokens", Form::Number),
    ("MOERUN_LOG_PROMPTS", "log_prompts", Form::Truth),
];

/// Settings that variables give, by their names. An empty variable counts as unset.
pub(super) fn settings(variable: impl Fn(&str) -> Option<String>) -> Result<Dict, SettingsError> {
    let mut settings = Dict::new();
    for &(name, key, form) in VARIABLES {
        let Some(text) = variable(name).filter(|text| !text.trim().is_empty()) else {
            continue;
        };
        let value = match form {
            Form::Text => Value::from(text),
            Form::Number => {
                let number: u64 = text
                    .trim()
                    .parse()
                    .map_err(|_| SettingsError(format!("{name}: wanted a number, found {text:?}")))?;
                Value::from(number)
            }
            Form::Truth => match text.trim() {
                "true" | "1" => Value::from(true),
                "false" | "0" => Value::from(false),
                other => return Err(SettingsError(format!("{name}: wanted true or false, found {other:?}"))),
            },
            Form::List => Value::from(text.split(',').map(|item| item.trim().to_owned()).collect::<Vec<_>>()),
        };
        settings.insert(key.to_owned(), value);
    }
    Ok(settings)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(name: &'static str, value: &'static str) -> Result<Dict, SettingsError> {
        settings(move |variable| (variable == name).then(|| value.to_owned()))
    }

    #[test]
    fn each_variable_is_read_in_the_form_of_its_setting() {
        assert_eq!(
            with("MOERUN_SERVED_NAME", "123").unwrap()["served_name"],
            Value::from("123")
        );
        assert_eq!(with("MOERUN_THREADS", " 3 ").unwrap()["threads"], Value::from(3u64));
        assert_eq!(
            with("MOERUN_WORKER", "a:1, b:2").unwrap()["worker"],
            Value::from(vec!["a:1", "b:2"])
        );
        assert_eq!(with("MOERUN_INSECURE", "1").unwrap()["insecure"], Value::from(true));
        assert!(
            with("MOERUN_INSECURE", "yes")
                .unwrap_err()
                .to_string()
                .contains("MOERUN_INSECURE")
        );
        assert!(with("MOERUN_MAX_QUEUE", "").unwrap().is_empty());
        assert!(with("MOERUN_ISA", "avx2").unwrap().is_empty());
    }

    #[test]
    fn a_number_that_is_none_is_refused_with_its_variable() {
        let error = with("MOERUN_THREADS", "many").unwrap_err().to_string();
        assert!(
            error.contains("MOERUN_THREADS") && error.contains("\"many\""),
            "{error}"
        );
    }
}
