"""Training: the Trainer, the folder of a run, and going on from it.

``trainer``    ``ZOTrainer``
``config``     ``ZOConfig``
``run_folder`` the files of a run
``checkpoint`` weights and rule state put back
``replay``     weights made again from the journal
``journal``    one line a step
``writer``     what is written, and when
``callback``   the Trainer's calls of it
``resume``     where a run goes on
``auto_lr``    the learning rate that a run keeps
``signals``    a run that is asked to stop
"""
