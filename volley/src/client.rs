//! Which fleet a command speaks to, and as whom.
//!
//! A client file (TOML) names placers, the identity and the tenant; `volley dev` and `volley init` write one. It is
//! `--client FILE`, else `VOLLEY_CLIENT`, else the one of `volley dev`; its keys may be set by `VOLLEY_CLIENT_<KEY>`
//! and by flags. Paths in it are relative to the file. Operators' commands use the operator's identity where the file
//! names one, so that one file serves the person who runs a fleet and uses it.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use clap::Args;
use serde::{Deserialize, Serialize};
use volley_client::{CallError, Client, ConnectOptions, LaunchError};
use wire::{Code, Fault};

use crate::{config::Layers, failure::Failure, role::runtime};

/// Flags of every command that speaks to a fleet.
#[derive(Args, Clone, Debug, Default, Serialize)]
#[command(next_help_heading = "Fleet")]
pub(crate) struct ClientFlags {
    /// Client file; default: the one that `volley dev` writes.
    #[arg(long, env = "VOLLEY_CLIENT", value_name = "FILE", hide_env_values = true)]
    #[serde(skip)]
    client: Option<PathBuf>,
    /// Address of a placer, instead of the file's. May be repeated.
    #[arg(long = "placer", value_name = "ADDR")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    placers: Vec<SocketAddr>,
    /// Directory with cert.pem, key.pem and ca.pem, instead of the file's.
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    identity: Option<PathBuf>,
    /// In whose name; a tenant's certificate allows no other.
    #[arg(long, value_name = "TENANT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    tenant: Option<String>,
    /// Object store of images and the host map.
    #[arg(long, value_name = "URL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    objects: Option<String>,
}

/// What a client file says.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct ClientFile {
    /// Placers' addresses.
    pub(crate) placers: Vec<SocketAddr>,
    /// Directory of the tenant's identity.
    pub(crate) identity: PathBuf,
    /// Directory of the operator's identity.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) operator: Option<PathBuf>,
    /// In whose name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tenant: Option<String>,
    /// Object store of images and the host map.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) objects: Option<String>,
}

impl ClientFile {
    /// The settings that flags, environment and file add up to.
    pub(crate) fn load(flags: &ClientFlags) -> Result<Self, Failure> {
        let named = flags.client.clone();
        let file = match named {
            Some(file) => Some(file),
            None => dev_state().map(|state| state.join("client.toml")).filter(|file| file.exists()),
        };
        let folder = file.as_deref().and_then(Path::parent).unwrap_or(Path::new("")).to_owned();
        let mut loaded: Self = Layers::over_file(file).environment("VOLLEY_CLIENT_", &[]).load()?;
        for path in [Some(&mut loaded.identity), loaded.operator.as_mut()].into_iter().flatten() {
            if !path.as_os_str().is_empty() && path.is_relative() {
                *path = folder.join(&*path);
            }
        }
        if !flags.placers.is_empty() {
            loaded.placers.clone_from(&flags.placers);
        }
        if let Some(identity) = &flags.identity {
            loaded.identity.clone_from(identity);
            loaded.operator = None;
        }
        loaded.tenant = flags.tenant.clone().or(loaded.tenant);
        loaded.objects = flags.objects.clone().or(loaded.objects);
        Ok(loaded)
    }

    /// Writes it.
    pub(crate) fn save(&self, file: &Path) -> Result<(), Failure> {
        let text = toml::to_string(self)
            .map_err(|error| Failure::new(Code::Internal, format!("client file: {error}")))?;
        std::fs::write(file, text).map_err(|error| Failure::io(file.display(), &error))
    }

    /// The object store's URL.
    pub(crate) fn objects(&self) -> Result<&str, Failure> {
        self.objects.as_deref().ok_or_else(|| {
            Failure::new(Code::Config, "no object store is named")
                .hint("give --objects URL, or a client file that names it")
        })
    }

    fn options(&self, operator: bool) -> Result<ConnectOptions, Failure> {
        let identity = self.operator.as_ref().filter(|_| operator).unwrap_or(&self.identity);
        if self.placers.is_empty() || identity.as_os_str().is_empty() {
            return Err(Failure::new(
                Code::Config,
                "no fleet to speak to: no client file, and no flags",
            )
            .hint(
                "start one with `volley dev`, or give --client FILE (see `volley init --help`)",
            ));
        }
        Ok(ConnectOptions {
            placers: self.placers.clone(),
            identity: identity.clone(),
            tenant: self.tenant.clone(),
            ..ConnectOptions::default()
        })
    }
}

/// Where `volley dev` keeps its fleet unless it is told otherwise.
pub(crate) fn dev_state() -> Option<PathBuf> {
    let absolute =
        |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let state =
        absolute("XDG_STATE_HOME").or_else(|| Some(absolute("HOME")?.join(".local/state")))?;
    Some(state.join("volley/dev"))
}

/// A connected client and the runtime that it lives on.
pub(crate) struct Session {
    runtime: tokio::runtime::Runtime,
    client: Client,
}

impl Session {
    /// Connects as the tenant.
    pub(crate) fn open(flags: &ClientFlags) -> Result<Self, Failure> {
        Self::open_as(flags, false)
    }

    /// Connects as the operator, where the client file names one.
    pub(crate) fn open_as(flags: &ClientFlags, operator: bool) -> Result<Self, Failure> {
        Self::over(&ClientFile::load(flags)?, operator)
    }

    /// Connects to the fleet of a client file.
    pub(crate) fn over(file: &ClientFile, operator: bool) -> Result<Self, Failure> {
        let runtime = runtime()?;
        let client = runtime.block_on(Client::connect(file.options(operator)?))?;
        Ok(Self { runtime, client })
    }

    /// The client.
    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// Runs something on the session's runtime.
    pub(crate) fn block<T>(&self, task: impl Future<Output = T>) -> T {
        self.runtime.block_on(task)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // Placers see a clean end instead of waiting for a silent one.
        self.runtime.block_on(self.client.close());
    }
}

impl From<CallError> for Failure {
    fn from(error: CallError) -> Self {
        Fault::from(error).into()
    }
}

impl From<LaunchError> for Failure {
    fn from(error: LaunchError) -> Self {
        match &error {
            LaunchError::Unknown { launch_id, .. } => {
                let hint =
                    format!("ask again with --launch-id {launch_id}: it is started at most once");
                Self::from(Fault::from(error)).hint(hint)
            }
            _ => Fault::from(error).into(),
        }
    }
}
