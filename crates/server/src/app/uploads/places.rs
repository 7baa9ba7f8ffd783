//! Who may upload now: so many at once, fewer for one account, one for each image.
//!
//! Invariant: an image has one upload at a time, and nothing of what is kept of it is removed meanwhile. One account leaves others
//! a place, where there is more than one.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use tiffin_store::Upload;
use tiffin_types::id::{AccountId, ImageId};

use crate::{
    app::{
        images::uploading,
        places::{Share, Shares},
    },
    error::AppError,
};

/// How far an upload is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Progress {
    /// What is uploaded.
    pub(crate) part: Upload,
    /// Bytes that came.
    pub(crate) received_bytes: u64,
    /// Bytes that the client said would come.
    pub(crate) expected_bytes: Option<u64>,
    /// Whether all have come, and they are being made an image of.
    pub(crate) converting: bool,
    /// Files of the filesystem that were unpacked.
    pub(crate) converted_entries: u64,
}

/// What is counted of an upload.
pub(super) struct Counters {
    part: Upload,
    pub(super) received: AtomicU64,
    expected: Option<u64>,
    pub(super) converting: AtomicBool,
    pub(super) entries: AtomicU64,
}

/// The uploads that are under way, by image.
pub(crate) struct Ongoing {
    most: usize,
    shares: Shares,
    taken: Arc<Mutex<HashMap<ImageId, Taken>>>,
}

enum Taken {
    By(Arc<Counters>),
    /// What is kept of it is being removed.
    Still,
}

impl Ongoing {
    /// So many at once.
    pub(crate) fn new(most: usize) -> Self {
        Self { most, shares: Shares::new(most, "uploads"), taken: Arc::default() }
    }

    /// How far the upload to that image is, if there is one.
    pub(crate) fn progress(&self, id: &ImageId) -> Option<Progress> {
        let counters = match self.hold().get(id)? {
            Taken::By(counters) => Arc::clone(counters),
            Taken::Still => return None,
        };
        Some(Progress {
            part: counters.part,
            received_bytes: counters.received.load(Ordering::Relaxed),
            expected_bytes: counters.expected,
            converting: counters.converting.load(Ordering::Relaxed),
            converted_entries: counters.entries.load(Ordering::Relaxed),
        })
    }

    /// Whether there is one.
    pub(crate) fn contains(&self, id: &ImageId) -> bool {
        self.hold().contains_key(id)
    }

    /// Keeps uploads away from an image until that is dropped; `None` while there is one.
    pub(crate) fn keep_still(&self, id: &ImageId) -> Option<Still> {
        let mut taken = self.hold();
        if taken.contains_key(id) {
            return None;
        }
        taken.insert(id.clone(), Taken::Still);
        Some(Still { id: id.clone(), taken: Arc::clone(&self.taken) })
    }

    /// A place for an upload to an image, until it is dropped.
    pub(super) fn take(
        &self,
        id: &ImageId,
        account: &AccountId,
        part: Upload,
        expected: Option<u64>,
    ) -> Result<Place, AppError> {
        let mut taken = self.hold();
        if taken.contains_key(id) {
            return Err(uploading());
        }
        let share = self.shares.take(account)?;
        if taken.values().filter(|taken| matches!(taken, Taken::By(_))).count() >= self.most {
            return Err(AppError::Unavailable {
                code: "busy",
                message: "too many uploads are being received at once; try again shortly".into(),
            });
        }
        let counters = Arc::new(Counters {
            part,
            received: AtomicU64::new(0),
            expected,
            converting: AtomicBool::new(false),
            entries: AtomicU64::new(0),
        });
        taken.insert(id.clone(), Taken::By(Arc::clone(&counters)));
        drop(taken);
        Ok(Place { counters, _share: share, _still: Still { id: id.clone(), taken: Arc::clone(&self.taken) } })
    }

    fn hold(&self) -> MutexGuard<'_, HashMap<ImageId, Taken>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The right to upload to an image.
pub(super) struct Place {
    pub(super) counters: Arc<Counters>,
    _share: Share,
    _still: Still,
}

/// Nobody else uploads to the image.
pub(crate) struct Still {
    id: ImageId,
    taken: Arc<Mutex<HashMap<ImageId, Taken>>>,
}

impl Drop for Still {
    fn drop(&mut self) {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
    }
}
