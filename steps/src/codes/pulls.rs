//! Codes from 220 on: of backups into vaults.

super::codes! { PULLS:
220 CANNOT_BEGIN_PULL "The backup job could not be begun." "libvirt or QEMU refused; the message has their words." "The guest runs as before. Mend what the message names and start the backup again."
221 POINT_IN_TIME_LOST "The point in time of the backup was lost." "The guest was shut down, its QEMU ended, or somebody ended libvirt's backup job." "Start the backup again: what was stored is not stored twice."
222 SCRATCH_RAN_LOW "The backup was ended because room ran low for what the guest overwrites meanwhile." "The guest writes much, the vault is slow, or the file system of the scratch files is nearly full." "Give the scratch files a file system of their own (`backup.scratch_dir`), or back up at a quieter time. What was stored is not stored twice."
223 PLAINTEXT_REFUSED "A secret would lie in the vault in the open." "The guest's TPM, or passwords in its definition, belong into an encrypted vault." "Use an encrypted vault, or allow it: `--allow-plaintext`"
224 CANNOT_END_PULL "The backup job could not be ended yet." "libvirt or QEMU does not answer." "vmkeepd goes on trying. By hand: `virsh domjobabort DOMAIN`, then `virsh resume DOMAIN` if the guest is paused."
}
