//! A place for files: a folder on the local disk or a prefix on an object store.
//! Nothing else in the house opens a path of a table or an artifact.
//!
//! In: a URI (`artifacts`, `/data/x`, `file:///data/x`, `s3://bucket/prefix`, `memory:///`).
//! Out: get, put (whole objects: a put is a commit), list, delete; errors name the object.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::local::LocalFileSystem;
use object_store::path::Path as ObjectPath;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt};
use url::Url;

use crate::error::{Error, Result};

/// An object store and a prefix in it.
#[derive(Clone, Debug)]
pub struct Store {
    object: Arc<dyn ObjectStore>,
    /// Scheme and authority, `file:///` or `s3://bucket`.
    base: Url,
    prefix: ObjectPath,
}

impl Store {
    /// Opens `uri`; a path without a scheme is local and relative to `root`.
    /// Errors: unknown scheme or bad URI (exit 78), a store that cannot be configured (exit 75).
    pub fn open(uri: &str, root: &Path) -> Result<Store> {
        if !uri.contains("://") {
            let path = std::path::absolute(root.join(uri))
                .map_err(|e| Error::spec(format!("`{uri}` is not a usable path")).because(e))?;
            return Store::local(&path);
        }
        let url = Url::parse(uri).map_err(|e| Error::spec(format!("`{uri}` is not a valid URI")).because(e))?;
        if url.scheme() == "file" {
            let path = url.to_file_path().map_err(|()| {
                Error::spec(format!("`{uri}` is not a local path")).with_help("write file:///absolute/path")
            })?;
            return Store::local(&path);
        }
        let options = std::env::vars().map(|(k, v)| (k.to_ascii_lowercase(), v));
        let (object, prefix) = match url.scheme() {
            "s3" | "s3a" | "memory" => object_store::parse_url_opts(&url, options)
                .map_err(|e| Error::environment(format!("cannot open `{uri}`")).because(e))?,
            other => {
                return Err(Error::spec(format!("`{uri}` has the unknown scheme `{other}`"))
                    .with_help("use a local path, file:// or s3://"));
            }
        };
        let mut base = url.clone();
        base.set_path("/");
        Ok(Store { object: Arc::from(object), base, prefix })
    }

    /// A local folder; it need not exist yet.
    pub fn local(path: &Path) -> Result<Store> {
        let prefix = ObjectPath::from_absolute_path(path)
            .map_err(|e| Error::spec(format!("`{}` is not a usable path", path.display())).because(e))?;
        let base = Url::parse("file:///").map_err(|e| Error::internal("file URL").because(e))?;
        Ok(Store { object: Arc::new(LocalFileSystem::new()), base, prefix })
    }

    /// The same store, one folder further down; `relative` uses `/`.
    pub fn child(&self, relative: &str) -> Store {
        Store { prefix: self.path(relative), ..self.clone() }
    }

    /// The object path of `relative` below this place.
    pub fn path(&self, relative: &str) -> ObjectPath {
        relative.split('/').filter(|p| !p.is_empty()).fold(self.prefix.clone(), |p, part| p.join(part))
    }

    /// The store itself, for readers that want it.
    pub fn object_store(&self) -> Arc<dyn ObjectStore> {
        self.object.clone()
    }

    /// Scheme and authority, as DataFusion registers stores by.
    pub fn base_url(&self) -> &Url {
        &self.base
    }

    /// How a person names `relative`: an absolute local path or a URI.
    pub fn display(&self, relative: &str) -> String {
        let path = self.path(relative);
        match self.base.scheme() {
            "file" => format!("/{path}"),
            _ => format!("{}{path}", self.base),
        }
    }

    /// The local file of `relative`, where this is a local store.
    pub fn local_path(&self, relative: &str) -> Option<std::path::PathBuf> {
        (self.base.scheme() == "file").then(|| Path::new("/").join(self.path(relative).as_ref()))
    }

    /// A whole object. Error (exit 75) names it.
    pub async fn get(&self, relative: &str) -> Result<Bytes> {
        let fail = |e| Error::environment(format!("cannot read {}", self.display(relative))).because(e);
        self.object.get(&self.path(relative)).await.map_err(fail)?.bytes().await.map_err(fail)
    }

    /// A whole object, or `None` where there is none.
    pub async fn get_opt(&self, relative: &str) -> Result<Option<Bytes>> {
        let fail = |e| Error::environment(format!("cannot read {}", self.display(relative))).because(e);
        match self.object.get(&self.path(relative)).await {
            Ok(found) => Ok(Some(found.bytes().await.map_err(fail)?)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(fail(e)),
        }
    }

    /// Puts a whole object; readers see the old one or the new one, never a part.
    pub async fn put(&self, relative: &str, bytes: Bytes) -> Result<()> {
        self.object
            .put(&self.path(relative), bytes.into())
            .await
            .map(|_| ())
            .map_err(|e| Error::environment(format!("cannot write {}", self.display(relative))).because(e))
    }

    /// Size, time and tag of an object, or `None` where there is none.
    pub async fn head(&self, relative: &str) -> Result<Option<ObjectMeta>> {
        match self.object.head(&self.path(relative)).await {
            Ok(meta) => Ok(Some(meta)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(Error::environment(format!("cannot look at {}", self.display(relative))).because(e)),
        }
    }

    /// All objects below `relative`, sorted by path.
    pub async fn list(&self, relative: &str) -> Result<Vec<ObjectMeta>> {
        let mut found: Vec<ObjectMeta> = self
            .object
            .list(Some(&self.path(relative)))
            .try_collect()
            .await
            .map_err(|e| Error::environment(format!("cannot list {}", self.display(relative))).because(e))?;
        found.sort_by(|a, b| a.location.cmp(&b.location));
        Ok(found)
    }

    /// Deletes an object; one that is not there is no error.
    pub async fn delete(&self, relative: &str) -> Result<()> {
        match self.object.delete(&self.path(relative)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(e) => Err(Error::environment(format!("cannot delete {}", self.display(relative))).because(e)),
        }
    }
}
