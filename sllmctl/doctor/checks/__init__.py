"""The checks, one group a module; `sllmctl.doctor.all_checks` imports them all."""
