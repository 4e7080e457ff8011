#!/usr/bin/env bash
# Prints the runs behind one figure of the paper, a command per line; with --plot, draws the figure from these runs.
#
#   scripts/figure.sh 4 > fig4.list && scripts/sweep.sh fig4.list
#   scripts/figure.sh 4 --plot figures [--unfinished]
#
# Figures, with the paper's captions in short:
#   1         DQN and Rainbow scale with the experts of Soft MoE; Top-1 MoE helps Rainbow only, wider dense layers hurt.
#             20 games, 1, 2, 4 and 8 experts.
#   4         Soft MoE yields gains even at high replay ratios. DQN and Rainbow, 8 experts.
#   5         Scaling down the dimensionality of Soft MoE's experts has no significant impact. Rainbow.
#   6         Comparison of tokenizations: Soft MoE is best with PerConv, Top-1 MoE with PerFeat; PerSamp is worst.
#             Rainbow, 8 experts.
#   7         MoEs also show gains with the standard CNN as encoder. DQN and Rainbow, 8 experts.
#   8         Soft MoE on 60 games, and with phi learned or random. Rainbow, 8 experts.
#   9         Load-balancing losses do not improve Top-1 MoE. DQN and Rainbow, 8 experts.
#   10        Rank of features and gradients, feature norm and dormant neurons over training. Rainbow, 3 games.
#   11, 17    Offline, CQL and CQL+C51 on 5, 10 and 50% of the data in $DATA/<game>: Soft MoE is the best. 17 games.
#   12, 16    Low data, DER and DrQ(eps): 26 games, with 8 experts (12) and with 4 (16). The paper trains on to 50M
#             agent steps, where MoEs gain; the list has the 100,000 of Atari-100k (STEPS=50000000 for the paper's).
#   13 to 15  The encoder before the experts or in each ("Big"), with and without normalised routing. DQN and Rainbow.
#             A Big expert reads 84 * 84 tokens: routing weights alone take 6 GB at a batch of 32. "All" was not
#             released by the authors.
#   18        Filters of 3x3, 4x4 and 6x6 in the Impala encoder. Rainbow, 8 experts.
#   drq_eps   Not in the paper: DrQ(eps) with the Nature CNN, dense and with 4 experts, on the 18 games of
#             drq_eps_100k.csv. --plot also draws the evaluations beside those of the 100 published seeds. A game starts
#             with up to 28 no-op frames (Dopamine's DrQ(eps) of 2022: 29); der_softmoe.py's default is up to 116.
#   tokenize  "Don't flatten, tokenize!" (Sokar et al., 2024): what of a Soft MoE carries the gain. Rainbow.
#
# In the environment GAMES, SEEDS and STEPS (agent steps; updates offline) replace the paper's. RUNS_DIR is the folder of
# the runs, FLAGS are added to every command, and figure 10 keeps the weights every WEIGHTS_EVERY steps. A game is an
# Atari name (Breakout) or a Gymnasium id (module:Game-v0). A run is named after its flags, so figures share runs.
set -euo pipefail
scripts=$(dirname "$0")
fail() { echo "error: $1" >&2; exit 2; }

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
drq_eps="--no-distributional --no-noisy --no-prioritized --augment --target-network-frequency 1 --epsilon-decay-steps 5000"
three=("dense --num-experts 1" "top1moe --num-experts 8" "softmoe --num-experts 8")

# A figure's runs are all combinations of agents, layers and variants, on every game.
agents=(rainbow) games=$games20 layers=("${three[@]}") variants=("") x=num_experts published=''
case ${1:-} in
    1) agents=(dqn rainbow) layers=({dense,top1moe,softmoe}" --num-experts "{1,2,4,8}) ;;
    4)
        agents=(dqn rainbow) layers=("dense --num-experts 1" "softmoe --num-experts 8") x=replay_ratio
        variants=("" "--replay-ratio 0.5" "--replay-ratio 1" "--replay-ratio 2") ;;
    5)
        layers=("softmoe --num-experts "{1,2,4,8} "softmoe --num-experts 2 --expert-hidden-dim 256"
            "softmoe --num-experts 4 --expert-hidden-dim 128" "softmoe --num-experts 8 --expert-hidden-dim 64")
        x=expert_hidden_dim ;;
    6)
        layers=({softmoe,top1moe}" --num-experts 8") x=tokenization
        variants=("" "--tokenization PerFeat" "--tokenization PerSamp") ;;
    7) agents=({dqn,rainbow}" --encoder nature") ;;
    8) games=$games60 layers=("dense --num-experts 1" "softmoe --num-experts 8"{," --no-learned-phi"}) ;;
    9)
        agents=(dqn rainbow) layers=("top1moe --num-experts 8") x=load_balancing
        variants=("" "--load-balancing "{importance,load,importance+load}) ;;
    10) games="Asterix Pong SpaceInvaders" variants=("--weights-every ${WEIGHTS_EVERY:-2500000}") ;;
    11 | 17)
        agents=(cql) games=$games17 x=data_fraction
        variants=({,"--no-distributional "}"--data-fraction "{0.05,0.1,0.5}) ;;
    12 | 16)
        agents=({der,drq_eps}" --encoder impala") games=$games26
        [ "$1" = 12 ] || layers=("${three[@]/%8/4}") ;;
    13 | 14 | 15)
        agents=(dqn rainbow) layers=("dense --num-experts 1"
            "softmoe --num-experts 8"{," --normalize-router"," --expert-variant big"," --expert-variant big --normalize-router"}) ;;
    18) variants=("" "--impala-filter 4" "--impala-filter 6") x=impala_filter ;;
    drq_eps)
        agents=("drq_eps --noop-max 8") layers=("dense --num-experts 1" "softmoe --num-experts 4")
        published=$scripts/drq_eps_100k.csv
        games=$(tail -n +2 "$published" | cut -d, -f1) ;;
    tokenize)
        layers=({dense,gap,tokenized,softmoe}" --num-experts "{1,4} "softmoe --num-experts 1 --expert-hidden-dim 2048"
            "expert_choice --num-experts 4" "softmoe --num-experts 4 --tokenization "{PerFeat,PerSamp,PerPatch,Shuffled}
            "softmoe --num-experts 4 --capacity-factor "{0.1,0.5}) ;;
    -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) fail "there is no figure ${1:-without a name}; there are 1, 4 to 18, drq_eps and tokenize (scripts/figure.sh --help)" ;;
esac
figure=$1 folder='' unfinished=''
shift
while [ $# -gt 0 ]; do
    case $1 in
        --plot) folder=${2:-}; [ -n "$folder" ] || fail "--plot needs a folder"; shift ;;
        --unfinished) unfinished=$1 ;;
        *) fail "$1 is no option: figure.sh NAME [--plot FOLDER [--unfinished]]" ;;
    esac
    shift
done

games=${GAMES:-$games} seeds=${SEEDS:-1 2 3 4 5}
[[ ${RUNS_DIR:-}${DATA:-} != *[[:space:]]* ]] || fail "RUNS_DIR and DATA must have no spaces"
for game in $games; do
    [[ $game == *-v* ]] || grep -q "^$game," "$scripts/atari_scores.csv" ||
        fail "GAMES: $game is no Atari game; scripts/atari_scores.csv lists their names"
done
for number in $seeds ${STEPS:-} ${WEIGHTS_EVERY:-}; do
    [[ $number =~ ^[0-9]+$ ]] || fail "SEEDS, STEPS and WEIGHTS_EVERY must be whole numbers, not $number"
done

lines() {  # agent, flags: a command per game and seed
    local agent=$1 script=$1 flags="${*:2}${FLAGS:+ $FLAGS}" length=total-timesteps more=''
    [ "$agent" = drq_eps ] && script=der more=$drq_eps
    local name=${flags//--/}${STEPS:+ steps $STEPS}
    name=${name//[ \/]/-}
    [ ${#name} -le 200 ] || fail "FLAGS make the name of a run too long"
    for game in $games; do
        local env_id=$game data=
        [[ $game == *-v* ]] || env_id=${game}NoFrameskip-v4
        [ "$agent" = cql ] && data="--dataset-dir ${DATA:-data}/$game" length=total-updates
        for seed in $seeds; do
            echo python "${script}_softmoe.py" --env-id "$env_id" --seed "$seed" $more $flags $data \
                ${STEPS:+--$length "$STEPS"} --runs-dir "${RUNS_DIR:-runs}" \
                --run-name "${game//[:\/]/-}__${agent}__${name}__seed$seed" --resume auto --no-checkpoint-at-end
        done
    done
}

list() {
    local agent layer variant
    for agent in "${agents[@]}"; do
        for layer in "${layers[@]}"; do
            for variant in "${variants[@]}"; do
                lines $agent --layer $layer $variant
            done
        done
    done
}

if [ -z "$folder" ]; then
    list
elif [ "$figure" = 10 ]; then
    python "$scripts/analyze.py" $(list | sed 's/.* --runs-dir \([^ ]*\) --run-name \([^ ]*\).*/\1\/\2/') -o "$folder"
else
    list | python "$scripts/collect.py" --list /dev/stdin -o "$folder/results.csv" $unfinished
    python "$scripts/plot.py" "$folder/results.csv" -o "$folder" --x "$x" ${published:+--published "$published"}
fi
