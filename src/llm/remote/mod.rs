//! An LLM behind a server that speaks the OpenAI protocol (vLLM, llama.cpp server, TGI, hosted ones).
//!
//! In: [`EngineConfig`], prompts as text ([`Ask`]). Out: one [`Outcome`] per prompt: scores of its
//! candidates, or the reason why there are none. What may go wrong with a server goes wrong here and
//! nowhere else: [`client`] sends, bounds and retries; [`protocol`] writes requests and reads answers;
//! [`reading`] makes an order out of free text; [`asking`] keeps many requests in flight, watches the
//! deadline, and notices that a server is down.

pub mod asking;
pub mod client;
pub mod config;
pub mod protocol;
pub mod reading;

pub use self::asking::{Ask, Outcome, Remote, Reply, Sink};
pub use self::client::{Failure, Spent};
pub use self::config::{Dialect, EngineConfig, EngineKind, Price, RemoteSpec, Structured};
pub use self::protocol::Reading;
