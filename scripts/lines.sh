# Sourced by the figures' scripts: the paper's games, and what one line of a sweep looks like.
#
# GAMES, SEEDS, STEPS (agent steps; updates offline) and RUNS_DIR in the environment replace the paper's, FLAGS go to
# every command. A game is an Atari name (Breakout) or a Gymnasium id (module:Game-v0). A run is named after its flags,
# so figures share their runs; but figure 10's, which keep their weights.

case ${1:-} in -h | --help) sed -n '/^# /s///p' "$0" "${BASH_SOURCE[0]}"; exit 0 ;; esac
[[ ${RUNS_DIR:-}${DATA:-} != *[[:space:]]* ]] || { echo "error: RUNS_DIR and DATA must have no spaces" >&2; exit 2; }

games20="AirRaid Asterix Asteroids Bowling Breakout DemonAttack Freeway Gravitar Jamesbond MontezumaRevenge MsPacman
Pong PrivateEye Qbert Seaquest SpaceInvaders Venture WizardOfWor YarsRevenge Zaxxon"
games26="Alien Amidar Assault Asterix BankHeist BattleZone Boxing Breakout ChopperCommand CrazyClimber DemonAttack
Freeway Frostbite Gopher Hero Jamesbond Kangaroo Krull KungFuMaster MsPacman Pong PrivateEye Qbert RoadRunner Seaquest
UpNDown"
games17="Asterix Breakout Pong Seaquest Qbert SpaceInvaders Zaxxon YarsRevenge RoadRunner MsPacman BeamRider Jamesbond
Enduro WizardOfWor IceHockey DoubleDunk DemonAttack"
games60="AirRaid Alien Amidar Assault Asterix Asteroids Atlantis BankHeist BattleZone BeamRider Berzerk Bowling Boxing
Breakout Carnival Centipede ChopperCommand CrazyClimber DemonAttack DoubleDunk ElevatorAction Enduro FishingDerby
Freeway Frostbite Gopher Gravitar Hero IceHockey Jamesbond JourneyEscape Kangaroo Krull KungFuMaster MontezumaRevenge
MsPacman NameThisGame Phoenix Pitfall Pong Pooyan PrivateEye Qbert Riverraid RoadRunner Robotank Seaquest Skiing
Solaris SpaceInvaders StarGunner Tennis TimePilot Tutankham UpNDown Venture VideoPinball WizardOfWor YarsRevenge
Zaxxon"

lines() {  # agent, games, flags: a command per game and seed
    local agent=$1 games=${GAMES:-$2} length=total-timesteps
    [ "$agent" = cql ] && length=total-updates
    shift 2
    local flags="$*${FLAGS:+ $FLAGS}"
    local name=${flags//--/}${STEPS:+ steps $STEPS}
    name=${name//[ \/]/-}
    for game in $games; do
        local env_id=$game data=
        [[ $game == *-v* ]] || env_id=${game}NoFrameskip-v4
        [ "$agent" = cql ] && data="--dataset-dir ${DATA:-data}/$game"
        for seed in ${SEEDS:-1 2 3 4 5}; do
            echo python "${agent}_softmoe.py" --env-id "$env_id" --seed "$seed" $flags $data \
                ${STEPS:+--$length "$STEPS"} --runs-dir "${RUNS_DIR:-runs}" \
                --run-name "${game//[:\/]/-}__${agent}__${name}__seed$seed" --resume auto --no-checkpoint-at-end
        done
    done
}
