//! Which test provokes which code.
//!
//! A code is worth its page only if the failure behind it is real. So each has a test that brings it about, and the
//! table says which: `file::test`. Read are the sources themselves. A code that nothing raises, one that no test of
//! the table provokes, and a test that has been renamed, switched off, or does not name its code any more, all fail here.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use vmkeep_workflow::Code;

use super::*;

/// The directory's: they belong to the entries by which a directory (LDAP) would order backups, which vmkeep does not
/// speak to. Nothing raises them.
const OF_THE_DIRECTORY: &[(Code, &str)] = &[
    (CANNOT_COPY_BACKEND_FILE_TO_BACKUP_LOCATION, "the directory's entries beside a backup"),
    (CANNOT_CONNECT_TO_BACKEND, "the directory is not there"),
    (WRONG_STATE_INFORMATION, "the mode of an entry"),
    (CANNOT_SAVE_BACKEND_ENTRY, "an entry"),
    (BACKEND_XML_UNCONSISTENCY, "entry and definition name other disks"),
    (UNKNOWN_BACKEND_TYPE, "the kind of directory"),
];

const E2E: &str = "replay-tests/tests/e2e/";
const ENGINE: &str = "workflow/tests/engine.rs";
const FOLD: &str = "workflow/src/state/tests.rs";
const CLI: &str = "host/tests/cli.rs";
const API: &str = "host/tests/api.rs";
const DAEMON: &str = "host/tests/daemon.rs";
const CONFIG: &str = "host/src/config/tests.rs";
const BROKEN: &str = "steps/src/snapshot/tests/broken.rs";
const ACT: &str = "steps/src/snapshot/tests/act.rs";
const WAY_BACK: &str = "steps/src/snapshot/tests/way_back.rs";
const PLAN: &str = "steps/src/workflows/snapshot/tests.rs";
const RESTORE: &str = "steps/src/restore/tests/mod.rs";
const FROM_VAULT: &str = "steps/src/restore/from_vault/tests/refused.rs";
const FETCH: &str = "steps/src/restore/place/tests.rs";
const SAVE: &str = "steps/src/save/tests.rs";
const STATE: &str = "steps/src/save/keep.rs";
const KEPT: &str = "steps/src/inplace/keep.rs";
const VAULTS: &str = "host/src/vaults/tests.rs";
const VAULT: &str = "host/tests/vault/main.rs";
const VAULT_KEYS: &str = "host/tests/vault/keys.rs";
const VAULT_OFFLINE: &str = "host/tests/vault/offline.rs";
const VAULT_ONE: &str = "host/tests/vault/one.rs";
const VAULT_REFUSALS: &str = "host/tests/vault/refusals.rs";
const HYPERVISOR: &str = "steps/src/hypervisor/error.rs";

/// The test that provokes a code: its file (below [`E2E`] if it has no folder) and its name.
#[rustfmt::skip]
const PROVOKED: &[(Code, &str, &str)] = &[
    (SUCCESS_CODE, CLI, "a_jobs_own_code_is_the_exit_status_of_whoever_waits_for_it"),
    (UNDEFINED_ERROR, ENGINE, "a_panic_in_a_step_is_a_coded_failure_of_that_job_alone"),
    (MISSING_PARAMETER_IN_CONFIG_FILE, CONFIG, "a_homeless_user_is_told_what_is_missing"),
    (CONFIGURED_RAM_DISK_IS_NOT_VALUD, "save.rs", "a_ram_disk_that_will_not_do_is_refused_if_required_and_else_left_out_with_a_warning"),
    (NOT_ENOUGH_SPACE_ON_RAM_DISK, "save.rs", "a_ram_disk_that_is_too_small_is_refused_if_required"),
    (CANNOT_SAVE_MACHINE_STATE, SAVE, "a_save_that_fails_leaves_the_guest_running_and_says_why"),
    (CANNOT_WRITE_TO_BACKUP_LOCATION, "targets.rs", "a_target_that_cannot_be_written_is_refused_and_changes_nothing"),
    (CANNOT_COPY_FILE_TO_BACKUP_LOCATION, BROKEN, "firmware_variables_that_cannot_be_written_to_the_backup_are_named"),
    (CANNOT_COPY_IMAGE_TO_BACKUP_LOCATION, BROKEN, "an_image_that_cannot_be_read_is_named"),
    (CANNOT_COPY_XML_TO_BACKUP_LOCATION, "steps/src/snapshot/publish.rs", "a_definition_that_cannot_be_written_is_no_backup_and_says_so"),
    (CANNOT_MERGE_DISK_IMAGES, BROKEN, "a_merge_that_qemu_refuses_leaves_the_guest_on_its_overlay_and_both_files_there"),
    (CANNOT_REMOVE_OLD_DISK_IMAGE, WAY_BACK, "overlays_go_only_when_nobody_uses_them_and_they_are_proved_to_be_home"),
    (CANNOT_REMOVE_FILE, STATE, "a_state_that_cannot_be_taken_from_the_ram_disk_is_named"),
    (CANNOT_CREATE_EMPTY_DISK_IMAGE, BROKEN, "an_overlay_is_not_made_over_a_file_that_bears_its_name"),
    (CANNOT_RENAME_DISK_IMAGE, FETCH, "an_image_that_cannot_be_given_its_name_leaves_the_old_one_alone"),
    (CANNOT_SET_DISK_IMAGE_OWNERSHIP, "rights.rs", "what_is_configured_and_cannot_be_given_fails_with_its_code_and_leaves_nothing"),
    (CANNOT_SET_DISK_IMAGE_PERMISSION, "rights.rs", "what_is_configured_and_cannot_be_given_fails_with_its_code_and_leaves_nothing"),
    (CANNOT_RESTORE_MACHINE, RESTORE, "whichever_call_fails_everything_is_taken_back"),
    (CANNOT_LOCK_MACHINE, BROKEN, "a_domain_that_libvirt_lets_nobody_mark_is_not_touched"),
    (CANNOT_FIND_MACHINE, "unknown.rs", "what_does_not_exist_is_refused_by_name"),
    (CANNOT_COPY_STATE_FILE_TO_RETAIN, STATE, "a_state_that_cannot_be_copied_stays_where_it_is"),
    (RETAIN_ROOT_DIRECTORY_DOES_NOT_EXIST, "restores.rs", "a_definition_that_is_none_and_a_folder_that_is_not_there_are_told_before_anything_is_made"),
    (BACKUP_ROOT_DIRECTORY_DOES_NOT_EXIST, "targets.rs", "a_target_that_cannot_be_written_is_refused_and_changes_nothing"),
    (CANNOT_CREATE_DIRECTORY, BROKEN, "a_folder_that_cannot_be_made_is_named"),
    (CANNOT_SAVE_XML, KEPT, "a_definition_that_cannot_be_kept_is_named_before_anything_is_exchanged"),
    (CANNOT_SET_DIRECTORY_OWNERSHIP, "rights.rs", "what_is_configured_and_cannot_be_given_fails_with_its_code_and_leaves_nothing"),
    (CANNOT_SET_DIRECTORY_PERMISSION, "rights.rs", "what_is_configured_and_cannot_be_given_fails_with_its_code_and_leaves_nothing"),
    (CANNOT_FIND_CONFIGURATION_ENTRY, CONFIG, "a_file_that_was_named_must_exist_and_the_usual_one_need_not"),
    (CANNOT_CREATE_TARBALL, CLI, "the_exit_status_tells_a_divergence_from_damage_and_from_a_good_history"),
    (UNSUPPORTED_FILE_TRANSFER_PROTOCOL, "targets.rs", "a_target_outside_the_roots_or_reached_by_a_detour_is_refused"),
    (MISSING_NECESSARY_FILES, "weaknesses.rs", "weakness_08_every_file_counts_when_completeness_is_asked_for"),
    (CORRUPT_DISK_IMAGE_FOUND, "weaknesses.rs", "weakness_04_nothing_older_goes_before_every_file_of_the_newer_is_there_and_verified"),
    (UNSUPPORTED_CONFIGURATION_PARAMETER, DAEMON, "what_makes_no_sense_ends_the_daemon_with_its_code_before_anything_is_made"),
    (CANNOT_MOVE_DISK_IMAGE_TO_ORIGINAL_LOCATION, FETCH, "an_image_that_cannot_be_given_its_name_leaves_the_old_one_alone"),
    (BACKUP_NOT_SURE, FROM_VAULT, "a_backup_that_nobody_answers_for_is_restored_only_if_that_is_asked_for"),
    (CANNOT_DEFINE_MACHINE, RESTORE, "whichever_call_fails_everything_is_taken_back"),
    (CANNOT_START_MACHINE, RESTORE, "whichever_call_fails_everything_is_taken_back"),
    (CANNOT_WORK_ON_UNDEFINED_OBJECT, KEPT, "a_machine_that_is_not_kept_and_one_whose_record_is_damaged_are_told_apart"),
    (CANNOT_READ_STATE_FILE, STATE, "a_state_that_went_with_its_ram_disk_is_told_and_the_way_without_it"),
    (CANNOT_READ_XML_FILE, "restores.rs", "a_definition_that_is_none_and_a_folder_that_is_not_there_are_told_before_anything_is_made"),
    (NOT_ALL_FILES_DELETED_FROM_RETAIN_LOCATION, KEPT, "what_cannot_be_removed_of_what_was_kept_is_told_and_the_record_goes_last"),
    (NOT_ENOUGH_DISK_SPACE, "weaknesses.rs", "weakness_05_a_target_without_room_keeps_every_backup_and_says_so"),
    (NO_DISK_SPACE_INFORMATION, PLAN, "a_file_system_that_does_not_say_how_much_room_it_has_is_named"),
    (HYPERVISOR_FORGOT_DOMAIN, HYPERVISOR, "trouble_that_has_a_code_of_its_own_keeps_it_and_what_cannot_be_is_not_tried_again"),
    (USAGE, CLI, "words_that_make_no_sense_exit_with_64_and_never_with_2"),
    (DAEMON_UNREACHABLE, CLI, "without_a_daemon_the_exit_status_and_the_message_say_so"),
    (NO_SUCH_JOB, "unknown.rs", "what_does_not_exist_is_refused_by_name"),
    (SUBJECT_BUSY, "busy.rs", "a_domain_that_another_job_of_ours_holds_is_refused_or_waited_for"),
    (NEEDS_ATTENTION, ENGINE, "the_lock_of_a_job_that_needs_attention_outlives_a_restart_and_ends_when_it_is_settled"),
    (FACTS_CHANGED, ACT, "a_domain_that_was_started_on_its_overlays_is_not_taken_for_a_snapshot"),
    (STEP_DEADLINE, FOLD, "a_step_that_was_late_or_stood_still_and_has_done_nothing_fails_with_the_limit_that_it_exceeded"),
    (STEP_STALLED, FOLD, "a_step_that_was_late_or_stood_still_and_has_done_nothing_fails_with_the_limit_that_it_exceeded"),
    (UNKNOWN_STEP_KIND, ENGINE, "a_job_that_cannot_be_read_keeps_its_subject_and_stops_no_other"),
    (EFFECT_DIVERGED, SAVE, "a_guest_that_was_loaded_onto_other_files_is_not_let_run"),
    (EFFECT_UNKNOWN, FOLD, "a_doubt_that_no_probe_can_end_needs_attention_and_nothing_is_undone"),
    (CANCELLED, CLI, "an_operator_steers_a_job_and_the_journal_knows_who_and_why"),
    (UNDO_FAILED, RESTORE, "a_definition_that_cannot_be_taken_back_needs_an_operator_and_names_the_way"),
    (STORE_DAMAGED, "store.rs", "a_store_that_is_damaged_newer_or_in_use_is_refused_untouched"),
    (STORE_RESERVE_SPENT, ENGINE, "a_store_that_lives_on_its_reserve_begins_no_job_until_there_is_room_again"),
    (STORE_IN_USE, "store.rs", "a_store_that_is_damaged_newer_or_in_use_is_refused_untouched"),
    (STORE_TOO_NEW, "store.rs", "a_store_that_is_damaged_newer_or_in_use_is_refused_untouched"),
    (INVALID_STATE, "busy.rs", "a_domain_that_another_job_of_ours_holds_is_refused_or_waited_for"),
    (DUPLICATE_KEY, "jobs.rs", "the_same_key_is_the_same_job_and_never_another_request"),
    (HYPERVISOR_UNREACHABLE, "jobs.rs", "vmkeepd_waits_for_libvirt_and_says_so"),
    (HYPERVISOR_TOO_OLD, HYPERVISOR, "trouble_that_has_a_code_of_its_own_keeps_it_and_what_cannot_be_is_not_tried_again"),
    (REMOTE_HYPERVISOR, DAEMON, "what_makes_no_sense_ends_the_daemon_with_its_code_before_anything_is_made"),
    (DOMAIN_NOT_RUNNING, PLAN, "each_reason_to_refuse_has_its_code"),
    (DOMAIN_TRANSIENT, PLAN, "each_reason_to_refuse_has_its_code"),
    (DOMAIN_BUSY_ELSEWHERE, "busy.rs", "a_domain_that_somebody_else_works_on_is_refused"),
    (FOREIGN_MARKER, "busy.rs", "a_vmkeepd_with_another_store_keeps_off_a_domain_until_the_first_is_through_with_it"),
    (OUR_LEFTOVERS, PLAN, "a_disk_on_somebodys_overlay_or_on_a_leftover_of_ours_is_refused"),
    (FOREIGN_SNAPSHOT, PLAN, "each_reason_to_refuse_has_its_code"),
    (NO_SUCH_DISK, "unknown.rs", "what_does_not_exist_is_refused_by_name"),
    (NO_DISK_TO_BACK_UP, PLAN, "a_domain_without_a_disk_that_can_take_part_is_refused"),
    (FIRMWARE_STATE_UNSUPPORTED, PLAN, "each_reason_to_refuse_has_its_code"),
    (MEMORY_UNSAVEABLE, SAVE, "a_guest_that_its_operator_has_paused_is_not_saved"),
    (MEMORY_TOO_LARGE, "room.rs", "too_little_room_is_refused_before_anything_is_touched"),
    (MEMORY_TOO_SLOW, ACT, "memory_that_takes_too_long_is_given_up_or_the_guest_is_stopped_or_the_disks_are_taken_alone"),
    (CANNOT_TAKE_SNAPSHOT, BROKEN, "a_snapshot_that_libvirt_refuses_leaves_the_guest_on_its_own_images"),
    (CANNOT_FREEZE, BROKEN, "a_guest_whose_agent_refuses_is_not_backed_up_frozen"),
    (CANNOT_THAW, BROKEN, "a_thaw_that_fails_is_tried_again_until_the_guest_is_thawed"),
    (FROZEN_BY_OTHERS, ACT, "an_operators_freeze_is_neither_used_nor_thawed"),
    (OVERLAYS_OUTGREW_SPACE, "room.rs", "a_copy_is_given_up_when_the_guests_own_file_system_fills_up"),
    (HYPERVISOR_LOST_TRACK, PLAN, "each_reason_to_refuse_has_its_code"),
    (IMAGE_LOCKED, WAY_BACK, "a_base_that_a_helper_holds_is_named_and_waited_for"),
    (TARGET_OUTSIDE_ROOTS, "targets.rs", "a_target_outside_the_roots_or_reached_by_a_detour_is_refused"),
    (UNSAFE_PATH, "targets.rs", "a_target_outside_the_roots_or_reached_by_a_detour_is_refused"),
    (MANIFEST_MISMATCH, "manifest.rs", "a_backup_that_is_not_what_its_manifest_says_is_refused"),
    (MANIFEST_TOO_NEW, "restores.rs", "a_restore_that_cannot_be_is_refused_and_leaves_nothing"),
    (NO_SUCH_BACKUP, "unknown.rs", "what_does_not_exist_is_refused_by_name"),
    (BACKUP_EXISTS, "restores.rs", "a_restore_that_cannot_be_is_refused_and_leaves_nothing"),
    (DOMAIN_EXISTS, "restores.rs", "a_restore_that_cannot_be_is_refused_and_leaves_nothing"),
    (MEMORY_FORMAT_UNKNOWN, RESTORE, "the_head_of_a_memory_image_that_has_no_room_is_refused_with_the_offer_of_a_cold_restore"),
    (MEMORY_INCOMPATIBLE, RESTORE, "memory_is_judged_by_the_disks_that_the_guest_had_and_not_by_those_of_its_next_start"),
    (CHAIN_UNREADABLE, PLAN, "a_definition_that_contradicts_its_images_is_refused_while_there_is_no_qemu_to_ask"),
    (DISK_CANNOT_TAKE_PART, PLAN, "disks_that_cannot_take_part_are_left_out_by_name_and_refused_if_asked_for"),
    (SOURCE_CHANGED, BROKEN, "an_image_that_somebody_wrote_to_since_it_stood_still_is_not_copied"),
    (AMBIGUOUS_NAME, API, "a_job_is_found_by_any_unique_beginning_and_an_ambiguous_one_is_refused"),
    (ON_OVERLAY_OF_OTHERS, PLAN, "a_disk_on_somebodys_overlay_or_on_a_leftover_of_ours_is_refused"),
    (MEMORY_LOST, BROKEN, "a_memory_image_that_was_cut_off_is_not_taken_for_one"),
    (REPLAY_DIVERGED, CLI, "the_exit_status_tells_a_divergence_from_damage_and_from_a_good_history"),
    (NOT_PERMITTED, API, "another_user_is_refused_by_the_kernels_word_also_when_the_socket_is_open_to_all"),
    (CANNOT_BRING_TO_REST, "in_place.rs", "a_guest_that_cannot_shut_down_is_left_alone_unless_the_plug_may_be_pulled"),
    (DEFINITION_NOT_TRUSTED, "in_place.rs", "a_backup_folder_alone_is_enough_on_another_host"),
    (STORE_UNAVAILABLE, DAEMON, "a_store_that_cannot_be_reached_is_not_called_damaged"),
    (VAULT_UNREACHABLE, VAULT_REFUSALS, "a_place_without_a_vault_and_a_place_with_one_are_told_apart"),
    (VAULT_DENIED, VAULTS, "each_failure_of_a_vaults_place_has_a_code_of_its_own"),
    (VAULT_UNFIT, VAULTS, "each_failure_of_a_vaults_place_has_a_code_of_its_own"),
    (NO_VAULT, VAULT_REFUSALS, "a_place_without_a_vault_and_a_place_with_one_are_told_apart"),
    (VAULT_EXISTS, VAULT_REFUSALS, "a_place_without_a_vault_and_a_place_with_one_are_told_apart"),
    (VAULT_EXCHANGED, VAULT_REFUSALS, "a_vault_that_was_exchanged_is_refused_until_its_header_is_back_or_it_is_forgotten"),
    (VAULT_KEY_WRONG, VAULT_KEYS, "a_vault_is_attached_from_another_host_by_its_key_and_by_no_other"),
    (VAULT_KEY_REFUSED, VAULT_KEYS, "a_recovery_key_that_is_never_confirmed_leaves_nothing"),
    (VAULT_TOO_NEW, VAULT_REFUSALS, "a_vault_that_was_exchanged_is_refused_until_its_header_is_back_or_it_is_forgotten"),
    (VAULT_MAY_NOT, VAULT_KEYS, "keys_are_added_and_removed_and_the_words_open_what_no_key_opens"),
    (VAULT_DAMAGED, VAULT, "a_damaged_backup_is_named_and_healed_from_its_copy_under_another_key"),
    (VAULT_BUSY, VAULT_REFUSALS, "a_collection_goes_away_while_another_is_at_work_and_comes_again_when_that_is_given_up"),
    (VAULT_COPY_REFUSED, VAULT_REFUSALS, "nothing_is_copied_onto_itself_or_into_the_open_by_mistake"),
    (WRITTEN_DIFFERS, VAULT_OFFLINE, "a_restore_that_is_killed_anywhere_is_finished_by_the_same_words_and_by_no_others"),
    (TARGET_HOLDS_DATA, VAULT_ONE, "a_disk_goes_to_a_file_which_is_replaced_whole_or_left_as_it_is"),
    (CANNOT_BEGIN_PULL, "vault.rs", "a_backup_job_that_qemu_refuses_leaves_nothing_and_is_not_begun_twice"),
    (POINT_IN_TIME_LOST, "vault.rs", "a_guest_that_is_shut_down_in_the_middle_loses_only_the_backup"),
    (SCRATCH_RAN_LOW, "vault.rs", "a_backup_is_ended_while_there_is_still_room_for_what_the_guest_overwrites"),
    (PLAINTEXT_REFUSED, "vault.rs", "a_secret_goes_only_into_an_encrypted_vault_unless_that_is_allowed"),
    (CANNOT_END_PULL, "vault.rs", "a_backup_job_of_a_qemu_that_does_not_answer_is_ended_when_it_does"),
];

fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// The names by which sources speak of a code: the registry's, and the engine's own for the one that it has another for.
fn names(code: Code) -> Vec<&'static str> {
    let other = (code == UNDEFINED_ERROR).then_some("UNDEFINED");
    std::iter::once(name(code)).chain(other).collect()
}

fn words(text: &str) -> HashSet<&str> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').collect()
}

fn says(words: &HashSet<&str>, code: Code) -> bool {
    names(code).iter().any(|name| words.contains(name))
}

/// The text of a test, if there is one of that name: from its attribute to the end of its function.
fn test<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let at = text.find(&format!("fn {name}()"))?;
    let (before, rest) = text.split_at(at);
    let line = before.rfind('\n').map_or(0, |end| end + 1);
    let indent = text[line..].len() - text[line..].trim_start().len();
    let above: Vec<&str> = before[..line].lines().rev().take(2).map(str::trim).collect();
    let is_test =
        above.first().is_some_and(|line| line.starts_with("#[test]") || line.starts_with("#[tokio::test"));
    if !is_test || above.iter().any(|line| line.starts_with("#[ignore")) {
        return None;
    }
    let end = rest.find(&format!("\n{}}}\n", " ".repeat(indent)))?;
    Some(&rest[..end])
}

/// The sources of a folder without what is only for tests.
fn program(folder: &Path, found: &mut String) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let file_name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() {
            if !["tests", "codes"].contains(&file_name) {
                program(&path, found);
            }
        } else if path.extension().is_some_and(|end| end == "rs") && file_name != "tests.rs" {
            let text = std::fs::read_to_string(&path).unwrap();
            found.push_str(text.split("#[cfg(test)]\nmod tests {").next().unwrap());
        }
    }
}

#[test]
fn every_code_is_provoked_by_a_test_that_names_it() {
    for (code, file, wanted) in PROVOKED {
        let below = if file.contains('/') { "" } else { E2E };
        let path = sources().join(format!("{below}{file}"));
        let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let test = test(&text, wanted).unwrap_or_else(|| panic!("{file} has no test {wanted}"));
        assert!(says(&words(test), *code), "{wanted} does not name {}", name(*code));
    }
    let places = PROVOKED.iter().map(|(code, ..)| *code);
    let mut codes: Vec<Code> = places.chain(OF_THE_DIRECTORY.iter().map(|(code, _)| *code)).collect();
    codes.sort_unstable_by_key(|code| code.0);
    let registry: Vec<Code> = all().map(|entry| entry.code).collect();
    let missing: Vec<_> =
        registry.iter().filter(|code| !codes.contains(code)).map(|code| name(*code)).collect();
    assert!(missing.is_empty(), "no test provokes {missing:?}: write one, and name it in the table");
    assert_eq!(codes, registry, "a code stands in the table twice");
}

#[test]
fn every_code_is_raised_but_for_those_of_the_directory() {
    let mut text = String::new();
    for part in ["steps/src", "host/src", "workflow/src", "store/src"] {
        program(&sources().join(part), &mut text);
    }
    let said = words(&text);
    for entry in all().filter(|entry| entry.code != SUCCESS_CODE) {
        let of_the_directory = OF_THE_DIRECTORY.iter().any(|(code, _)| *code == entry.code);
        assert_eq!(says(&said, entry.code), !of_the_directory, "{} {}", entry.code, entry.name);
    }
}
