//! A disk that can be full.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;

use super::TemporaryFolder;

/// A file system of a few megabytes that can be filled. Only root can create one.
#[derive(Debug)]
pub struct SmallDisk(TemporaryFolder);

impl SmallDisk {
    pub fn mount(megabytes: u32) -> anyhow::Result<Self> {
        let disk = Self(TemporaryFolder::new()?);
        let size = format!("size={megabytes}m,mode=755");
        run(Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "tmpfs"])
            .arg(disk.0.path()))?;
        Ok(disk)
    }

    /// Moves a folder to it and leaves a symbolic link in its place.
    pub fn take_in(&self, folder: &Path) -> anyhow::Result<()> {
        let here = self.0.path().join("data");
        run(Command::new("cp").arg("-a").arg(folder).arg(&here))?;
        fs::remove_dir_all(folder)?;
        Ok(std::os::unix::fs::symlink(here, folder)?)
    }

    /// Fills it.
    pub fn fill(&self) -> anyhow::Result<()> {
        let mut ballast = fs::File::create(self.ballast())?;
        let block = [0; 4096];
        loop {
            match ballast.write_all(&block) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::StorageFull => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Frees the space again.
    pub fn free(&self) -> anyhow::Result<()> {
        Ok(fs::remove_file(self.ballast())?)
    }

    fn ballast(&self) -> PathBuf {
        self.0.path().join("ballast")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a process that used it may still be ending.
        let _ = Command::new("umount")
            .arg("--lazy")
            .arg(self.0.path())
            .status();
    }
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let output = command
        .output()
        .with_context(|| format!("{command:?} cannot be started"))?;
    anyhow::ensure!(
        output.status.success(),
        "{command:?} failed: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}
