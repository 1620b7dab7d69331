//! Codes from 193 on: of vaults.

super::codes! { VAULTS:
193 VAULT_UNREACHABLE "The vault's place cannot be reached." "The folder is not there or not mounted, the server does not answer, or the network is down." "Mount the folder, or see whether the server answers; then do it again. What was put stays, and is reused."
194 VAULT_DENIED "The vault's place refuses these credentials." "The folder belongs to another user, or the keys for S3 or SSH do not suffice." "Check the rights of the folder, or the files of keys that the configuration names."
195 VAULT_UNFIT "The vault's place does not do what a vault needs." "It answers from a cache, cannot sync, or is not what it was said to be." "`vmkeep vault check VAULT --backend` tries what is relied upon."
196 NO_VAULT "There is no vault at that place." "Its file system is not mounted, the address is wrong, or no vault was made." "Mount it; or make a vault: `vmkeep vault init VAULT`"
197 VAULT_EXISTS "There is a vault at that place already." "A new one was to be made there; or two were made at the same time, and met." "Use the one that is there: `vmkeep vault attach VAULT`. Of two that met, remove the one that nobody wants."
198 VAULT_EXCHANGED "That is not the vault that this host knows." "Its header is another, or says that there is no encryption although there is a key: the vault was replaced, another one is mounted, or its header is damaged." "Find out which. `vmkeep vault repair VAULT --header` puts the known header back; `vmkeep vault forget VAULT` lets this host take the vault that is there."
199 VAULT_KEY_WRONG "The vault does not open with that." "No key was given, or that of another vault; or there is a typing error in the passphrase or in the 24 words." "Give the passphrase, the key file or the 24 words of this vault."
200 VAULT_KEY_REFUSED "A secret cannot be used." "Its file is missing, can be read by others, belongs to somebody else or is too short; or it was not confirmed." "`chmod 600 FILE`; a key file has at least 32 bytes, a passphrase at least one character."
201 VAULT_TOO_NEW "The vault, or something in it, is of a newer release." "Another host that uses it has a newer vmkeep." "Use the newer release."
202 VAULT_MAY_NOT "This key to the vault may not do that." "It is of the role writer: it makes and reads backups, and neither prunes nor collects." "Do it with the full key."
203 VAULT_DAMAGED "Something in the vault is damaged or missing." "The storage lost or changed it, or somebody did." "`vmkeep vault check VAULT` names the backups that are hurt; `vmkeep vault repair VAULT` heals what still has its bytes somewhere."
204 VAULT_BUSY "The vault is in use, and what was to be done waits for others." "Another collection is at work, another host has begun something that is not over, or it has given this one up for dead." "Do it again later. Who shows no sign of life for a day is given up."
205 VAULT_COPY_REFUSED "A backup was not copied." "It is not there, unchecked, damaged or to be pruned; it is pruned in the other vault; or it holds secrets and the other vault has no encryption." "The message says which; an encrypted vault takes everything."
206 BACKUP_NOT_SURE "The backup is unchecked, or is to be pruned." "Its writer has not finished, or somebody wants it gone: what it needs may be missing, now or soon." "Restore another backup of the domain; or this one, if it is still whole: `--unchecked`"
207 WRITTEN_DIFFERS "What was written does not read back as what the vault holds." "Somebody else writes there, or the storage is not sound." "Let nothing use it. Find out what wrote there, look into the kernel's log for errors of the storage, and do it again."
208 TARGET_HOLDS_DATA "The place that a disk was to be written to holds something." "It is a file with content or a device that does not read as zeroes: it may be the only copy of what is there." "Look at it. Back it up, choose another place, or, if nobody needs it: `--overwrite-without-copy`"
}
