/* Registers the options that pyxis adds to srun, and hands what they are given to the tasks as PYXIS_STUB_<number>.
   It tests how the options are spelled, not containers. */
#include <slurm/spank.h>
#include <stdio.h>
#include <string.h>

SPANK_PLUGIN(pyxis_stub, 1);

#define NUM_OPTIONS 3

static char *given[NUM_OPTIONS];

static int keep(int option, const char *argument, int is_remote) {
    given[option] = strdup(argument);
    return 0;
}

static struct spank_option options[] = {
    {"container-image", "IMAGE", "", 1, 0, keep},
    {"container-mounts", "MOUNTS", "", 1, 1, keep},
    {"container-workdir", "FOLDER", "", 1, 2, keep},
};

int slurm_spank_init(spank_t spank, int num_arguments, char **arguments) {
    for (int option = 0; option < NUM_OPTIONS; option++) spank_option_register(spank, &options[option]);
    return 0;
}

int slurm_spank_task_init(spank_t spank, int num_arguments, char **arguments) {
    char name[32];
    for (int option = 0; option < NUM_OPTIONS; option++) {
        snprintf(name, sizeof name, "PYXIS_STUB_%d", option);
        if (given[option]) spank_setenv(spank, name, given[option], 1);
    }
    return 0;
}
