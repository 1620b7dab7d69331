//! The behaviours, by what they are about.

mod commits;
mod definitions;
mod ends;
mod looks;
mod memory;
mod pulls;
mod takes;

use super::Behaviour;

macro_rules! behaviours {
    ($($module:ident::$name:ident $(($alone:ident))?),+ $(,)?) => {
        vec![$(Behaviour {
            name: stringify!($name),
            alone: stringify!($($alone)?) == "alone",
            show: |bench| Box::pin($module::$name(bench)),
        }),+]
    };
}

pub fn all() -> Vec<Behaviour> {
    behaviours![
        // Those that need a booted guest first: they take longest.
        memory::a_guest_goes_on_where_it_was_saved,
        takes::a_snapshot_with_memory_holds_the_guest_that_runs_on,
        takes::a_snapshot_of_a_paused_guest_leaves_it_paused,
        ends::a_guest_that_is_asked_to_shut_down_ends_and_has_not_crashed,
        ends::an_agent_freezes_once_and_thaws_once,
        looks::a_domain_that_is_off_has_nothing_but_its_persistent_definition,
        looks::a_running_domain_has_three_accounts_of_its_disks,
        looks::a_domain_that_was_started_paused_stands_still_because_somebody_asked,
        looks::a_guest_is_suspended_and_resumed_as_often_as_one_likes,
        looks::a_domain_is_found_by_name_uuid_or_a_beginning_that_fits_one,
        looks::a_domain_that_is_not_there_is_no_such_domain_for_every_call,
        looks::what_needs_a_running_guest_says_that_there_is_none,
        looks::to_start_what_runs_and_to_destroy_what_is_off_changes_nothing,
        looks::each_start_is_another_qemu,
        definitions::disks_are_pointed_elsewhere_in_the_persistent_definition_alone,
        definitions::disks_get_back_exactly_what_a_definition_says_of_them,
        definitions::a_replaced_definition_counts_from_the_next_start,
        definitions::a_definition_cannot_rename_its_domain,
        definitions::a_marker_is_in_both_definitions_and_a_hold_ends_with_the_guest,
        definitions::a_note_is_in_the_persistent_definition_alone,
        definitions::what_a_job_changes_does_not_make_another_definition,
        definitions::a_name_or_a_uuid_that_is_taken_is_not_defined_again,
        definitions::a_domain_that_runs_is_not_undefined_and_one_that_is_off_is,
        definitions::a_domain_that_an_operator_undefines_while_it_runs_lives_as_long_as_its_qemu,
        definitions::autostart_is_seen_and_taken_back,
        takes::a_snapshot_of_disks_moves_everybody_onto_the_overlays,
        takes::a_persistent_definition_that_names_the_overlays_already_is_left_alone,
        takes::a_snapshot_onto_overlays_that_cannot_be_opened_changes_nothing,
        takes::no_disk_is_moved_onto_the_overlay_that_it_is_on,
        takes::a_snapshot_of_what_is_off_gives_it_other_files_but_no_memory,
        commits::a_commit_is_begun_gets_ready_and_moves_everybody_back,
        commits::a_commit_that_is_given_up_leaves_the_guest_on_its_overlay,
        commits::a_chain_that_nobody_wrote_down_is_not_written_down_by_a_commit,
        commits::a_commit_is_begun_once_and_not_pivoted_before_it_is_ready,
        commits::a_paused_guest_is_committed_and_stays_paused,
        commits::a_base_that_somebody_holds_is_not_committed_into,
        commits::a_commit_ends_with_qemu_and_the_chain_is_whole,
        commits::what_is_off_is_committed_by_a_helper_and_what_runs_is_not,
        memory::a_saved_guest_is_off_and_its_image_names_its_disks,
        memory::an_image_that_is_torn_or_missing_is_not_loaded,
        memory::an_image_is_loaded_under_its_own_name_alone,
        memory::a_guest_that_was_saved_paused_runs_if_it_is_to_run,
        memory::a_copy_of_an_image_under_another_definition_is_another_machine,
        memory::a_guest_that_is_defined_no_more_is_loaded_as_a_transient_one,
        memory::a_managed_save_image_is_loaded_by_the_next_start,
        memory::a_managed_save_image_is_set_aside_and_given_back,
        pulls::a_pull_shows_the_disks_as_they_were_whatever_the_guest_writes,
        pulls::a_pull_since_a_checkpoint_tells_what_has_changed_since,
        pulls::a_pull_since_a_checkpoint_that_is_not_there_is_not_begun,
        pulls::checkpoints_are_deleted_one_by_one_while_the_domain_runs,
        pulls::bitmaps_outlive_an_end_and_none_a_killed_qemu,
        pulls::as_long_as_a_pull_lasts_there_is_no_other_job,
        pulls::a_pull_ends_with_qemu,
        ends::a_killed_qemu_is_a_crash_and_a_destroyed_one_is_not,
        ends::an_image_that_somebody_has_open_is_not_started_from,
        ends::a_missing_image_is_not_started_from,
        ends::without_an_agent_nothing_is_frozen,
        ends::a_guest_runs_on_under_a_new_libvirtd(alone),
        ends::a_new_libvirtd_has_every_definition_and_forgets_how_guests_ended(alone),
        ends::a_commit_goes_on_under_a_new_libvirtd(alone),
        pulls::a_pull_goes_on_under_a_new_libvirtd(alone),
    ]
}
