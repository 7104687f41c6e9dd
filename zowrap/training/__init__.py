"""Training: the Trainer, the folder of a run, and going on from it.

``trainer``      ``ZOTrainer``; it alone knows the Trainer, every other module is given values
``overrides``    which of the Trainer's methods a subclass may override, and what becomes of it
``config``       ``ZOConfig``
``loop``         the counts of the Trainer's loop
``run_folder``   the files of a run
``journal``      one line per step
``checkpoint``   loading weights and rule state
``replay``       weights made again from the journal
``environment``  what last bits depend on besides the options
``resume``       where a run goes on
``auto_lr``      the learning rate that a run keeps
``writer``       ``RunWriter``, which writes the files
``best_model``   the best evaluation
``step_log``     mean losses and skipped steps
``weight_check`` weights that became NaN or infinite
``callback``     the Trainer's calls of the writer
``callback_states`` the states of callbacks that have one, such as the patience of early stopping
``history``      the Trainer's log and these states, between two checkpoints
``signals``      requests to stop
``messages``     lines for the person who started the run
"""
