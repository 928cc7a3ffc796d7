//! Who may ask: API keys, the same at every door.
//!
//! A door hands over the value of its `authorization` header and gets the [`Client`] behind it, before it reads anything
//! else. What is counted or limited by key is kept under the client's name, which outlives a change of the list.

mod authenticator;
mod key;
mod key_list;

pub use authenticator::{AuthError, Authenticator, Client};
pub use key::{ApiKey, KeyHash};
pub use key_list::KeyList;
