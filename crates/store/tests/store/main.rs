//! The store's behaviour, on both databases: every case below runs on a fresh SQLite file and on a fresh database of a
//! real Postgres, from the same body.
//!
//! On SQLite each case is a test of its own. On Postgres all of them are one test, because the server that it starts
//! (and stops, whatever happens) costs more than the cases do.

#![allow(clippy::unwrap_used, reason = "a failing test is what a panic is for")]

mod accounts;
mod activity;
mod api_keys;
mod fixtures;
mod idempotency;
mod images;
mod open;
mod ports;
mod postgres;
mod quota;
mod snapshots;
mod sqlite_only;
mod users;
mod vms;
mod webhooks;

use fixtures::Db;

macro_rules! cases {
    ($($module:ident { $($case:ident,)+ })+) => {
        mod sqlite {
            $(mod $module {
                $(#[tokio::test(flavor = "multi_thread")]
                async fn $case() {
                    let folder = tempfile::tempdir().unwrap();
                    crate::$module::$case(crate::Db::sqlite(folder.path())).await;
                })+
            })+
        }

        const CASES: &[(&str, fn(Db) -> Case)] = &[
            $($((concat!(stringify!($module), "::", stringify!($case)), |db| Box::pin($module::$case(db))),)+)+
        ];
    };
}

type Case = std::pin::Pin<Box<dyn Future<Output = ()> + Send>>;

cases! {
    open {
        opening_again_keeps_the_data_and_runs_no_migration_twice,
        servers_that_open_an_empty_database_at_once_all_succeed,
        a_database_of_a_newer_version_is_refused,
        ping_answers_until_the_store_is_closed,
    }
    accounts {
        an_account_reads_back_and_its_name_is_taken,
        a_quota_can_be_changed,
        the_first_start_happens_once_however_many_race,
        there_is_no_first_start_once_there_is_an_account,
        a_first_start_that_fails_can_be_tried_again,
        a_corrupt_account_is_an_error_that_names_it,
    }
    api_keys {
        a_key_is_found_by_its_prefix_with_its_hash,
        a_key_needs_a_free_prefix_an_account_and_a_scope,
        a_key_is_revoked_once_and_for_good,
        last_use_only_moves_forward,
        keys_are_listed_by_account,
        a_corrupt_key_is_an_error_that_does_not_show_the_hash,
    }
    activity {
        entries_read_back_newest_first_and_in_pages,
        old_entries_are_forgotten_by_age_and_by_number,
        lasting_entries_are_forgotten_by_age_alone_and_crowd_nobody_out,
        runs_are_kept_by_vm_the_newest_of_them,
        every_change_of_a_vm_is_told_and_the_figures_count_it,
    }
    users {
        the_first_user_is_the_oldest_accounts_and_made_once_however_many_race,
        a_session_reads_back_is_used_and_ends,
        a_new_password_ends_every_session_and_those_that_the_old_one_would_begin,
        a_session_waits_for_a_change_of_the_password_that_is_under_way,
        old_and_idle_sessions_are_pruned_and_the_oldest_make_room,
    }
    images {
        an_account_sees_its_own_images_and_the_shared_ones,
        only_a_shared_image_becomes_the_default,
        there_is_exactly_one_default_however_many_race,
        an_image_is_found_by_digest_shared_ones_first,
        what_a_manifest_was_made_is_found_until_nobody_has_it_or_another_upload_replaced_it,
        an_import_keeps_to_both_parts_of_the_quota,
        digests_of_images_and_of_vms_that_exist_are_in_use,
        a_kernel_stays_as_long_as_an_image_a_vm_or_a_snapshot_has_it,
        an_image_of_no_account_is_refused,
        an_upload_begins_and_ends_and_gives_up_the_blob_that_it_replaces,
        an_accounts_images_are_bounded_in_number_and_bytes,
        an_accounts_own_default_goes_before_everybodys,
        an_image_that_is_used_a_default_or_uploaded_to_is_not_deleted,
        a_shared_image_goes_whoever_chose_it_and_an_own_default_does_not,
        choosing_an_image_that_is_being_deleted_is_no_failure,
        an_upload_that_has_ended_well_does_not_fail_later,
        what_is_kept_of_uploads_counts_against_the_quota_and_goes_with_the_image,
    }
    vms {
        a_new_vm_reads_back_to_its_own_account_alone,
        a_vm_goes_through_its_life_with_times_and_end,
        of_two_that_move_a_vm_one_wins,
        a_transition_that_the_table_refuses_is_a_conflict,
        a_vm_to_be_deleted_stays_so_and_does_not_start,
        deleted_vms_are_kept_but_not_listed,
        vms_are_counted_by_state,
        a_corrupt_vm_is_an_error_that_names_it,
        a_vm_needs_an_account_and_a_free_id,
        what_a_vm_serves_reads_back_and_a_cached_one_is_made_to_be_down,
        pages_tell_every_vm_once_whatever_is_made_meanwhile,
    }
    webhooks {
        a_webhook_reads_back_changes_and_is_its_accounts_own,
        of_webhooks_made_at_once_as_many_as_allowed_are,
        the_secret_before_is_good_for_a_time,
        a_vms_state_and_its_deliveries_are_written_together,
        an_entry_of_the_journal_is_delivered_once_however_often_it_is_written,
        what_is_claimed_is_nobody_elses_until_the_lease_is_over,
        a_delivery_is_tried_until_it_is_settled_and_can_be_asked_for_again,
        a_webhook_that_fails_for_too_long_or_is_gone_is_disabled,
        those_with_the_least_under_way_come_first_and_the_busy_not_at_all,
        old_deliveries_are_forgotten_and_those_of_webhooks_that_are_gone,
    }
    ports {
        a_port_has_one_name_however_often_it_is_asked_for,
        a_vm_has_so_many_ports_and_a_deleted_one_none,
        a_corrupt_port_is_an_error,
    }
    quota {
        of_32_inserts_at_once_exactly_the_quota_succeeds,
        a_vm_that_is_down_counts_for_disk_and_number_only,
        each_part_of_the_quota_is_enforced_by_name,
        a_start_over_the_quota_changes_nothing,
        of_starts_at_once_only_what_fits_succeeds,
        a_new_vm_does_not_count_twice_when_it_starts,
        accounts_do_not_share_a_quota,
    }
    snapshots {
        a_new_snapshot_reads_back_to_its_own_account_alone,
        a_snapshot_goes_through_its_life_by_compare_and_set,
        only_what_is_deleting_is_forgotten,
        a_snapshot_counts_for_the_disk_by_what_it_may_take_then_by_what_it_takes,
        of_inserts_at_once_exactly_as_many_as_allowed_succeed,
        a_snapshots_image_stays_in_use,
        a_fork_is_made_whole_or_not_at_all,
        a_fork_is_done_in_one_moment_or_not,
        a_fork_with_a_key_is_made_once,
        a_vm_that_runs_already_begins_as_running_within_the_quota,
    }
    idempotency {
        the_same_request_again_gets_the_same_vm,
        a_key_of_another_request_is_refused,
        a_key_is_its_accounts_own,
        of_requests_with_one_key_at_once_one_makes_the_vm,
        a_refused_request_leaves_its_key_unused,
        pruned_keys_are_forgotten,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_case_holds_on_postgres() {
    let cluster = postgres::Cluster::start().await;
    postgres::no_statement_or_idle_transaction_lasts_for_ever(cluster.database(CASES.len()).await).await;
    let mut failed = Vec::new();
    for (number, (name, case)) in CASES.iter().enumerate() {
        let db = cluster.database(number).await;
        // A task of its own, so that a panic fails this case and the others still run.
        let mut task = tokio::task::JoinSet::new();
        task.spawn(case(db));
        if task.join_next().await.expect("one task was spawned").is_err() {
            failed.push(*name);
        }
    }
    assert!(failed.is_empty(), "failed on Postgres: {failed:#?}");
}
