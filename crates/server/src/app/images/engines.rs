//! Which engine runs VMs of an image: one that boots the image's kernel, where it has one of its own.

use tiffin_engine::Kind;
use tiffin_types::{id::Digest, vm::EngineName};

use crate::{app::App, error::AppError};

/// What is to be done where no engine of the host boots kernels.
const SET_UP: &str = "it has a kernel of its own, which needs an engine that boots kernels (qemu), and this host has none: have its \
    administrator set qemu.kernel (the page Engines of the documentation says how), or use an image without a kernel";

/// The kind of VM that was asked for, or the one for those who don't say: the host's default, or, for an image with that
/// kernel of its own, the first that boots it.
pub(crate) fn kind_for(app: &App, engine: Option<EngineName>, kernel: Option<&Digest>) -> Result<Kind, AppError> {
    let kinds = app.engine.kinds();
    let boots = |kind: &Kind| kernel.is_none() || kind.capabilities.kernels;
    let Some(name) = engine else {
        let default = Some(app.engine.default_kind()).filter(boots);
        return default
            .or_else(|| kinds.iter().copied().find(boots))
            .ok_or_else(|| AppError::field("imageId", format!("names an image that can't be run here: {SET_UP}")));
    };
    match app.engine.kind(name) {
        None => Err(AppError::field("engine", format!("must be one of this host's: {}", names(kinds.iter())))),
        Some(kind) if boots(&kind) => Ok(kind),
        Some(_) => {
            let booting = names(kinds.iter().filter(|kind| boots(kind)));
            let remedy = match booting.is_empty() {
                true => SET_UP.to_owned(),
                false => format!(
                    "it has a kernel of its own; leave the field out, or name an engine that boots kernels: {booting}"
                ),
            };
            Err(AppError::field("engine", format!("is {}, which can't run this image: {remedy}", name.as_str())))
        }
    }
}

fn names<'a>(kinds: impl Iterator<Item = &'a Kind>) -> String {
    kinds.map(|kind| kind.name.as_str()).collect::<Vec<_>>().join(", ")
}
