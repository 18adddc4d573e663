//! A small file system that a test can fill.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;

use super::TemporaryFolder;

/// A tmpfs of a few megabytes. Only root can mount it.
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

    /// Moves a folder to this disk, and leaves a symbolic link at the old path.
    pub fn move_folder(&self, folder: &Path) -> anyhow::Result<()> {
        let here = self.0.path().join("data");
        run(Command::new("cp").arg("-a").arg(folder).arg(&here))?;
        fs::remove_dir_all(folder)?;
        Ok(std::os::unix::fs::symlink(here, folder)?)
    }

    /// Writes a file until the disk is full.
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

    /// Deletes the file that [`Self::fill`] wrote.
    pub fn free(&self) -> anyhow::Result<()> {
        Ok(fs::remove_file(self.ballast())?)
    }

    fn ballast(&self) -> PathBuf {
        self.0.path().join("ballast")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazy, because a process that uses the disk may not have exited yet.
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
