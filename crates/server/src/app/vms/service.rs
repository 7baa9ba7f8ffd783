//! VMs that run their image's program: what the program is, and making one that is cached.

use std::collections::BTreeMap;

use tiffin_engine::{EngineError, Observed};
use tiffin_store::{Change, Image, Vm};
use tiffin_types::{
    program::Program,
    vm::{VmEvent, VmSpec},
};

use super::{App, run::commit_running, spec_of};
use crate::{app::images::config_of, error::AppError, fault};

/// What the image's program is, with `env` over the image's own environment.
pub(super) fn program_of(image: &Image, env: &BTreeMap<String, String>) -> Result<Program, AppError> {
    config_of(image)?.program(env).map_err(|error| AppError::Unprocessable {
        code: "image_unusable",
        message: format!("the image's program can't be run: {error}"),
    })
}

/// Makes what the engine has of a VM that is to run `program`. It keeps the program: the environment is nowhere else.
pub(super) async fn engine_create(app: &App, vm: &Vm, program: &Program) -> Result<(), EngineError> {
    app.engine.create(&VmSpec { program: Some(program.clone()), ..spec_of(vm) }).await
}

/// Makes a cached VM that is CREATED, and takes it to STOPPED: all is done that can be before it is started.
pub(super) async fn prepare_new(app: &App, created: &Vm, program: &Program) -> Result<Vm, AppError> {
    engine_create(app, created, program).await?;
    fault::point("after_engine_create");
    match app.prepared.prepare(app, &created.id).await {
        // It boots when it is started.
        Ok(()) | Err(EngineError::NoCapacity(_)) => {}
        Err(error) => return Err(error.into()),
    }
    fault::point("after_prepare");
    let stopped = app.store.vm_transition(&created.id, created.state, VmEvent::Prepared, Change::default()).await?;
    // It was deleted meanwhile.
    stopped.ok_or(AppError::NotFound("VM"))
}

/// Goes on with a start that was cut short when the guest was up: the VM, RUNNING.
pub(crate) async fn finish_start(app: &App, starting: &Vm, observed: &Observed) -> Result<Vm, AppError> {
    if *observed == Observed::Paused {
        app.engine.resume(&starting.id).await?;
    }
    app.engine.program_start(&starting.id).await?;
    commit_running(app, starting, None).await
}
