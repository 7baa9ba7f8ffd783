//! The environments that images give to commands in their VMs, kept at hand: each command asks for one.
//!
//! An image isn't deleted while it has VMs, and what its configuration says changes with its content alone: with an upload to an image
//! that was imported, which leaves nothing of the configuration. Everybody's images are the platform's own, whose profile says
//! it: a shell that waits for commands has it from there, so nothing is sent of them.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError},
};

use tiffin_image::config::ImageConfig;
use tiffin_store::{Image, Vm};
use tiffin_types::{
    id::{Digest, ImageId},
    limits::ENV_VAR_BYTES,
};

use crate::{app::App, error::AppError};

/// Environments that are kept. Each is part of a configuration, which has its own bound.
const KEPT: usize = 64;

type Environment = Arc<BTreeMap<String, String>>;
/// An image, and what it had in it.
type Content = (ImageId, Digest);

/// Those that were asked for lately.
#[derive(Default)]
pub(super) struct Environments(Mutex<HashMap<Content, Environment>>);

impl Environments {
    fn get(&self, of: &Content) -> Option<Environment> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(of).cloned()
    }

    fn keep(&self, of: Content, environment: Environment) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= KEPT {
            kept.clear();
        }
        kept.insert(of, environment);
    }
}

/// What commands in that VM find in their environment by its image's word.
pub(in crate::app) async fn environment_of(app: &App, vm: &Vm) -> Result<BTreeMap<String, String>, AppError> {
    let (known, content) = (&app.images.environments, (vm.image_id.clone(), vm.image_digest.clone()));
    if let Some(environment) = known.get(&content) {
        return Ok((*environment).clone());
    }
    let image = app.store.image_get(&vm.account_id, &vm.image_id).await?;
    let environment =
        match image.filter(|image| image.account_id.is_some() && image.digest.as_ref() == Some(&vm.image_digest)) {
            Some(image) => usable(config_of(&image)?.environment()),
            None => BTreeMap::new(),
        };
    known.keep(content, Arc::new(environment.clone()));
    Ok(environment)
}

/// What an image says of itself.
pub(in crate::app) fn config_of(image: &Image) -> Result<ImageConfig, AppError> {
    serde_json::from_value(image.config.clone())
        .map_err(|error| AppError::internal(format!("the configuration of image {}", image.id), error))
}

/// Without what no kernel takes: an image may say anything, and its VMs are to be of use all the same.
fn usable(mut environment: BTreeMap<String, String>) -> BTreeMap<String, String> {
    environment.retain(|name, value| {
        !name.is_empty() && name.len() + value.len() <= ENV_VAR_BYTES && !name.contains('\0') && !value.contains('\0')
    });
    environment
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_command_could_be_given_is_left_out() {
        let environment =
            [("", "x"), ("A", "b=c"), ("B", "a\0b"), ("\0", ""), ("C", &"x".repeat(ENV_VAR_BYTES)), ("D", "")];
        let environment = environment.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        assert_eq!(usable(environment).into_keys().collect::<Vec<_>>(), ["A", "D"]);
    }

    #[test]
    fn no_more_than_the_bound_are_kept() {
        let environments = Environments::default();
        let ids: Vec<Content> = (0..3 * KEPT).map(|_| (ImageId::random(), Digest::from_sha256([7; 32]))).collect();
        for id in &ids {
            environments.keep(id.clone(), Arc::default());
            assert!(environments.get(id).is_some());
        }
        assert!(ids.iter().filter(|id| environments.get(id).is_some()).count() <= KEPT);
    }
}
