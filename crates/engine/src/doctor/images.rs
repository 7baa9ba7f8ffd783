//! Images that a server has found damaged.

use super::{Check, DoctorInput};

pub(super) fn check(input: &DoctorInput) -> Vec<Check> {
    let name = "images";
    let folders = ["images/sha256", "images/kernels"].map(|folder| input.data_dir.join(folder));
    let entries = folders.iter().filter_map(|folder| folder.read_dir_utf8().ok()).flatten().flatten();
    let damaged: Vec<String> = entries
        .filter_map(|entry| Some(entry.file_name().strip_suffix(".damaged")?.split('.').next()?.to_owned()))
        .collect();
    if damaged.is_empty() {
        return vec![Check::ok(name, "none is known to be damaged")];
    }
    let remedy = "upload them again (the default image: tiffin image build-default --force), and look at the disk";
    vec![Check::warn(name, format!("damaged: {}", damaged.join(", ")), remedy)]
}

#[cfg(test)]
mod tests {
    use camino::Utf8Path;

    use super::{super::Level, *};

    #[test]
    fn what_is_marked_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let data_dir = Utf8Path::from_path(folder.path()).unwrap().to_owned();
        let run_dir = data_dir.join("run");
        let input = DoctorInput {
            data_dir: data_dir.clone(),
            run_dir,
            engine: None,
            runsc: None,
            qemu: None,
            kernel: None,
            agent: None,
            listen: None,
            ingress: None,
        };
        assert_eq!(check(&input)[0].level, Level::Ok);
        std::fs::create_dir_all(data_dir.join("images/sha256")).unwrap();
        std::fs::write(data_dir.join("images/sha256/abc.erofs"), "").unwrap();
        assert_eq!(check(&input)[0].level, Level::Ok);
        std::fs::write(data_dir.join("images/sha256/abc.erofs.damaged"), "").unwrap();
        let found = &check(&input)[0];
        assert!(found.level == Level::Warn && found.found.ends_with(": abc"), "{found:?}");
    }
}
