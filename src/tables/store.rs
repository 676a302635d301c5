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
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt, PutMode};
use url::Url;

use crate::error::{Error, Result};
use crate::tables::s3;
use crate::tables::store_errors::{OrFailed, failed};

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
        let (object, prefix): (Arc<dyn ObjectStore>, ObjectPath) = match url.scheme() {
            "s3" | "s3a" => s3::open(&url)?,
            "memory" => {
                let (object, prefix) = object_store::parse_url(&url)
                    .map_err(|e| Error::spec(format!("cannot open `{uri}`")).because(e))?;
                (Arc::from(object), prefix)
            }
            other => {
                return Err(Error::spec(format!("`{uri}` has the unknown scheme `{other}`"))
                    .with_help("use a local path, file:// or s3://"));
            }
        };
        let mut base = url.clone();
        base.set_path("/");
        Ok(Store { object, base, prefix })
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

    /// The folder itself as a URL that ends with `/`.
    pub fn url(&self) -> Url {
        let mut url = self.base.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.clear().extend(self.prefix.parts().map(|p| p.as_ref().to_owned())).push("");
        }
        url
    }

    /// A whole object. Error (exit 75) names it.
    pub async fn get(&self, relative: &str) -> Result<Bytes> {
        let doing = || format!("cannot read {}", self.display(relative));
        self.object.get(&self.path(relative)).await.or_failed(doing)?.bytes().await.or_failed(doing)
    }

    /// A whole object, or `None` where there is none.
    pub async fn get_opt(&self, relative: &str) -> Result<Option<Bytes>> {
        let doing = || format!("cannot read {}", self.display(relative));
        match self.object.get(&self.path(relative)).await {
            Ok(found) => found.bytes().await.or_failed(doing).map(Some),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(failed(doing(), e)),
        }
    }

    /// Puts a whole object; readers see the old one or the new one, never a part.
    pub async fn put(&self, relative: &str, bytes: Bytes) -> Result<()> {
        let put = self.object.put(&self.path(relative), bytes.into()).await;
        put.or_failed(|| format!("cannot write {}", self.display(relative))).map(|_| ())
    }

    /// Puts an object that is not there yet, in one step; `false` where there is one. A store that lost the answer to a put
    /// that it carried out may say `false` for our own object: look at what it holds.
    pub async fn put_new(&self, relative: &str, bytes: Bytes) -> Result<bool> {
        match self.object.put_opts(&self.path(relative), bytes.into(), PutMode::Create.into()).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => Ok(false),
            Err(e) => Err(failed(format!("cannot write {}", self.display(relative)), e)),
        }
    }

    /// Size, time and tag of an object, or `None` where there is none.
    pub async fn head(&self, relative: &str) -> Result<Option<ObjectMeta>> {
        match self.object.head(&self.path(relative)).await {
            Ok(meta) => Ok(Some(meta)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(failed(format!("cannot look at {}", self.display(relative)), e)),
        }
    }

    /// All objects below `relative`, sorted by path.
    pub async fn list(&self, relative: &str) -> Result<Vec<ObjectMeta>> {
        let listed = self.object.list(Some(&self.path(relative))).try_collect().await;
        let mut found: Vec<ObjectMeta> = listed.or_failed(|| format!("cannot list {}", self.display(relative)))?;
        found.sort_by(|a, b| a.location.cmp(&b.location));
        Ok(found)
    }

    /// Whether this is a folder with something in it. On a local disk a look at the object says it better.
    pub async fn is_prefix(&self) -> Result<bool> {
        if self.base.scheme() == "file" {
            return Ok(false);
        }
        let first = self.object.list(Some(&self.prefix)).try_next().await;
        first.or_failed(|| format!("cannot list {}", self.display(""))).map(|found| found.is_some())
    }

    /// The names directly below `relative`, each once: of objects, and of folders with a `/` at the end.
    pub async fn names(&self, relative: &str) -> Result<Vec<String>> {
        let path = self.path(relative);
        let listed = self.object.list_with_delimiter(Some(&path)).await;
        let listed = listed.or_failed(|| format!("cannot list {}", self.display(relative)))?;
        let folders = listed.common_prefixes.iter().filter_map(|p| p.filename().map(|n| format!("{n}/")));
        let objects = listed.objects.iter().filter_map(|o| o.location.filename().map(str::to_owned));
        let mut names: Vec<String> = folders.chain(objects).collect();
        names.sort_unstable();
        Ok(names)
    }

    /// Deletes an object; one that is not there is no error.
    pub async fn delete(&self, relative: &str) -> Result<()> {
        match self.object.delete(&self.path(relative)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(e) => Err(failed(format!("cannot delete {}", self.display(relative)), e)),
        }
    }
}
