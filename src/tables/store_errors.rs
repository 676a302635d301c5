//! What an object store said, in one line and without what does not belong into a log.
//!
//! In: an error of `object_store`. Out: its text, and an [`Error`] with who is at fault: a store that does not answer may
//! come back (exit 75), a bucket that is not there will not (exit 78).

use crate::error::{Error, Result};

/// The error's text. Of an XML answer only code and message stay: the rest repeats the request and names the access key.
pub fn text(e: &object_store::Error) -> String {
    short(&e.to_string())
}

fn short(text: &str) -> String {
    let Some(begin) = text.find("<?xml").or_else(|| text.find("<Error")) else { return text.to_owned() };
    let tag = |name: &str| {
        let rest = text[begin..].split_once(&format!("<{name}>"))?.1;
        rest.split_once(&format!("</{name}>")).map(|(inside, _)| inside.trim().to_owned())
    };
    let said: Vec<String> = [tag("Code"), tag("Message")].into_iter().flatten().collect();
    format!("{}{}", &text[..begin], said.join(", "))
}

/// `doing` names the thing: `cannot read s3://bucket/x`.
pub fn failed(doing: String, e: object_store::Error) -> Error {
    use object_store::Error as Store;
    let said = text(&e);
    let error = match &e {
        Store::NotFound { .. } | Store::Generic { .. } if said.contains("NoSuchBucket") || matches!(e, Store::NotFound { .. }) => Error::spec(doing)
            .with_help("there is no such bucket or object; check the URI (tailfuse makes folders and no buckets)"),
        // Lists have no kind of their own for it.
        _ if is_refusal(&e) || said.contains("403 Forbidden") || said.contains("401 Unauthorized") => {
            Error::environment(doing).with_help(
                "check the credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, and what they may do",
            )
        }
        Store::Generic { .. } if said.contains("redirect without LOCATION") => {
            Error::spec(doing).with_help("the bucket is in another region; set AWS_REGION")
        }
        _ => Error::environment(doing),
    };
    error.because(said)
}

fn is_refusal(e: &object_store::Error) -> bool {
    matches!(e, object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. })
}

/// Shorthand for a call on a store.
pub trait OrFailed<T> {
    /// The value, or [`failed`].
    fn or_failed(self, doing: impl FnOnce() -> String) -> Result<T>;
}

impl<T> OrFailed<T> for object_store::Result<T> {
    fn or_failed(self, doing: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| failed(doing(), e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_cut_to_code_and_message() {
        let said = "Server returned non-2xx status code: 403 Forbidden: <?xml version=\"1.0\"?><Error><Code>SignatureDoesNotMatch</Code><Message>No.</Message><AWSAccessKeyId>AKIA</AWSAccessKeyId></Error>";
        assert_eq!(short(said), "Server returned non-2xx status code: 403 Forbidden: SignatureDoesNotMatch, No.");
        assert_eq!(short("disk full"), "disk full");
    }
}
